#pragma once

// What the files of Pipeline share.

#include <cstddef>
#include <vector>

#include "programs/pipeline.h"
#include "zimage_rt/check.h"

// One thread at a time, on the pipeline's device.
#define ZRT_TURN                                            \
  const std::lock_guard<std::recursive_mutex> turn(mutex_); \
  const DeviceGuard guard(options_.device)

namespace zimage_rt {

// Where one request's tensors lie in loop_memory_.
struct Pipeline::SampleBuffers {
  float* latents;
  float* kept;        // SamplerStep::kHistory times the latents
  float* step_noise;  // [draws, *latents], for the rows that take noise
  SamplerStep* steps;
  float* scales;  // of guidance, [steps, batch]
  float* normalization;
  float* mask;  // null, like the two behind it, unless a picture is kept
  float* image;
  float* noise;
  float* factors;
  std::uint8_t* pixels;
  Transformer::Buffers transformer;
  ControlNet::Buffers control;  // unset without a control image
  std::byte* decoder;           // shares the memory of the two above: it runs when they are done
};

struct Pipeline::Graph {
  std::vector<int> key;
  GraphExec exec;
  std::size_t bytes;
};

// Pixels a latent covers.
template <typename Vae>
std::size_t area(const Vae& vae) {
  return static_cast<std::size_t>(vae.factor()) * vae.factor();
}

template <typename T>
void upload_to(T* target, const T* source, std::size_t count, cudaStream_t stream) {
  ZRT_CUDA(cudaMemcpyAsync(target, source, count * sizeof(T), cudaMemcpyHostToDevice, stream));
}

}  // namespace zimage_rt
