#pragma once

// Declarations that the files of Pipeline share.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "cpu/sampler.h"
#include "device/check.h"
#include "device/device.h"
#include "models/controlnet.h"
#include "models/transformer.h"
#include "runtime/pipeline.h"

namespace zimage_rt {

inline constexpr char kTextEncoderWeights[] = "the text encoder's weights";

// Locks a pipeline for the calling thread, with its device current.
class PipelineLock {
 public:
  PipelineLock(std::recursive_mutex& mutex, int device) : lock_(mutex), guard_(device) {}

 private:
  const std::lock_guard<std::recursive_mutex> lock_;
  const DeviceGuard guard_;
};

// One call of Pipeline::sample.
struct Pipeline::Request {
  const SampleJob& job;
  const Conditioning& conditioning;
  SampleShape shape;           // with the negative samples, if any evaluation is guided
  const std::string& decoder;  // the module that makes the pixels
  std::uint8_t* pixels;        // null: not decoded
};

// The tensors of a request in loop_memory_, which captured kernels read and write.
struct Pipeline::SampleBuffers {
  float* latents;
  float* kept;        // SamplerStep::kHistory times the latents
  float* step_noise;  // like the latents, of the current step
  SamplerStep* step;  // the current one
  float* scales;      // its guidance, [batch]
  float* normalization;
  float* mask;  // null, like image and noise, without inpainting
  float* image;
  float* noise;
  float* factors;
  Transformer::Buffers transformer;
  ControlNet::Buffers control;  // unset without a control image
  // The decoder's, in the memory of the two above: it runs after them.
  std::uint8_t* pixels;
  int* not_finite;  // [1]
  std::byte* decoder;
};

// The tensors that no captured kernel uses, in table_memory_; they grow with the number of steps.
struct Pipeline::StepTables {
  SamplerStep* steps;
  float* scales;      // of guidance, [steps, batch]
  float* step_noise;  // [draws, *latents], of the steps that take noise
  Transformer::StepTable transformer;
  float* control_vectors;  // [steps, blocks, 4, dim]; null without a control image
  float* snapshots[2];     // latents after a step, for its callback; steps alternate
};

// Synchronises a stream at the end of a scope, even after an error, so that the memory of its work
// can be reused.
class StreamDrain {
 public:
  explicit StreamDrain(const Stream& stream) : stream_(stream) {}
  StreamDrain(const StreamDrain&) = delete;
  StreamDrain& operator=(const StreamDrain&) = delete;
  ~StreamDrain() { cudaStreamSynchronize(stream_.get()); }

 private:
  const Stream& stream_;
};

// Pixels per latent.
template <typename Vae>
std::size_t area(const Vae& vae) {
  return static_cast<std::size_t>(vae.factor()) * vae.factor();
}

// Synchronises the stream and reads a flag on the device.
inline bool read_flag(const int* flag, const Stream& stream) {
  int value = 0;
  ZRT_CUDA(cudaMemcpyAsync(&value, flag, sizeof(int), cudaMemcpyDeviceToHost, stream.get()));
  ZRT_CUDA(cudaStreamSynchronize(stream.get()));
  return value != 0;
}

template <typename T>
void upload_to(T* target, const T* source, std::size_t count, cudaStream_t stream) {
  ZRT_CUDA(cudaMemcpyAsync(target, source, count * sizeof(T), cudaMemcpyHostToDevice, stream));
}

}  // namespace zimage_rt
