#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>

#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/residual.h"

namespace zimage_rt {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void scaled_copy_kernel(const float* x, float scale, T* out, std::size_t count) {
  const std::size_t at = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (at >= count) return;
  float values[8];
  load8(x + at, values);
#pragma unroll
  for (float& value : values) value *= scale;
  store8(out + at, values);
}

__global__ void scaled_add_kernel(float* x, const float* added, const float* scale,
                                  std::size_t count) {
  const std::size_t at = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (at >= count) return;
  const float factor = scale == nullptr ? 1.0f : *scale;
  float values[8], more[8];
  load8(static_cast<const float*>(x) + at, values);
  load8(added + at, more);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] += factor * more[j];
  store8(x + at, values);
}

unsigned blocks_for(std::size_t count) {
  if (count % 8 != 0) throw std::invalid_argument("residual: expected a multiple of 8");
  return static_cast<unsigned>((count / 8 + kThreads - 1) / kThreads);
}

}  // namespace

void scaled_copy(const float* x, float scale, void* out, DType type, std::size_t count,
                 cudaStream_t stream) {
  const unsigned blocks = blocks_for(count);
  if (blocks == 0) return;
  for_half_type(type, [&](auto tag) {
    using T = decltype(tag);
    scaled_copy_kernel<T><<<blocks, kThreads, 0, stream>>>(x, scale, static_cast<T*>(out), count);
  });
  ZRT_LAUNCHED();
}

void scaled_add(float* x, const float* added, const float* scale, std::size_t count,
                cudaStream_t stream) {
  const unsigned blocks = blocks_for(count);
  if (blocks == 0) return;
  scaled_add_kernel<<<blocks, kThreads, 0, stream>>>(x, added, scale, count);
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
