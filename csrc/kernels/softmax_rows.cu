#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/softmax_rows.h"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// One block per row. The row is read three times, twice of them from the caches.
template <typename T>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const SoftmaxRows args) {
  __shared__ float scratch[2][32];
  const std::size_t row = static_cast<std::size_t>(blockIdx.x) * args.stride;
  const float* const x = args.x + row;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Eight values from `column`; those after the row's end are -inf, whose power is 0.
  const auto load = [&](int column, float (&values)[8]) {
    load8(x + column, values);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i >= args.columns) values[i] = -INFINITY;
  };
  float values[8];
  float most = -INFINITY;
  for (int column = threadIdx.x * 8; column < args.stride; column += kThreads * 8) {
    load(column, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, values[i]);
  }
  most = warp_max(most);
  if (lane == 0) scratch[0][warp] = most;
  __syncthreads();
  most = warp_max(lane < kWarps ? scratch[0][lane] : -INFINITY);
  float total = 0.0f;
  for (int column = threadIdx.x * 8; column < args.stride; column += kThreads * 8) {
    load(column, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) total += ex2_approx(values[i] - most);
  }
  const float inverse = args.scale / block_sum(total, scratch[1]);
  T* const out = static_cast<T*>(args.out) + row;
  for (int column = threadIdx.x * 8; column < args.stride; column += kThreads * 8) {
    load(column, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = ex2_approx(values[i] - most) * inverse;
    store8(out + column, values);
  }
}

}  // namespace

void softmax_rows(const SoftmaxRows& args, cudaStream_t stream) {
  if (args.columns < 1 || args.stride < args.columns || args.stride % 8 != 0)
    throw std::invalid_argument("softmax_rows: expected a column, and a multiple of 8 as stride");
  if (args.rows == 0) return;
  for_half_type(args.dtype, [&](auto tag) {
    softmax_kernel<decltype(tag)><<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(args);
    ZRT_LAUNCHED();
  });
}

}  // namespace zimage_rt
