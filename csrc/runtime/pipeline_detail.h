#pragma once

// What the files of Pipeline share.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/sampler.h"
#include "device/check.h"
#include "device/device.h"
#include "models/controlnet.h"
#include "models/transformer.h"
#include "runtime/pipeline.h"

namespace zimage_rt {

// Locks a pipeline for the calling thread, with its device current.
class PipelineLock {
 public:
  PipelineLock(std::recursive_mutex& mutex, int device) : lock_(mutex), guard_(device) {}

 private:
  const std::lock_guard<std::recursive_mutex> lock_;
  const DeviceGuard guard_;
};

// Where one request's tensors lie in loop_memory_: what captured kernels read and write.
struct Pipeline::SampleBuffers {
  float* latents;
  float* kept;        // SamplerStep::kHistory times the latents
  float* step_noise;  // like the latents: what the step that runs adds
  SamplerStep* step;  // the one that runs
  float* scales;      // its guidance, [batch]
  float* normalization;
  float* mask;  // null, like the two behind it, unless an image is kept
  float* image;
  float* noise;
  float* factors;
  Transformer::Buffers transformer;
  ControlNet::Buffers control;  // unset without a control image
  // The decoder's, in the memory of the two above: it runs when they are done.
  std::uint8_t* pixels;
  int* not_finite;  // [1]
  std::byte* decoder;
};

// What no captured kernel uses, in table_memory_: it grows with the number of steps.
struct Pipeline::StepTables {
  SamplerStep* steps;
  float* scales;      // of guidance, [steps, batch]
  float* step_noise;  // [draws, *latents], for the steps that take noise
  Transformer::StepTable transformer;
  float* control_vectors;  // [steps, blocks, 4, dim]; null without a control image
  float* seen[2];          // latents after a step, for its callback; steps alternate
};

// Waits for a stream at the end of a scope, also when an error ends it: memory that the stream
// works on is then free for others.
class StreamDrain {
 public:
  explicit StreamDrain(const Stream& stream) : stream_(stream) {}
  StreamDrain(const StreamDrain&) = delete;
  StreamDrain& operator=(const StreamDrain&) = delete;
  ~StreamDrain() { cudaStreamSynchronize(stream_.get()); }

 private:
  const Stream& stream_;
};

// How a module is loaded.
struct Pipeline::ModuleKind {
  const char* weights;  // what they are called when they do not fit
  bool patchable;       // see Pipeline::patch
  void (*arrange)(Pipeline& pipeline, Weights& weights);  // before the upload
  // Makes the program, which refers to the weights; after an error there is none.
  void (*construct)(Pipeline& pipeline, Weights& weights, const ModuleConfig& config);
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

// Waits for the stream and says what it left in a flag on the device.
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
