#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device/check.h"
#include "kernels/copy_rows.h"

namespace zimage_rt {
namespace {

constexpr int kThreads = 256;
constexpr std::size_t kMostBlocks = 512;  // per part; larger parts loop over the grid

// One row of blocks per part, with 16-byte accesses if the part is aligned.
__global__ void copy_rows_kernel(CopyRows args) {
  const CopyRows::Part part = args.parts[blockIdx.y];
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kThreads;
  if (part.count % 4 == 0 && reinterpret_cast<std::uintptr_t>(part.from) % 16 == 0) {
    const auto* const from = reinterpret_cast<const float4*>(part.from);
    auto* const to = reinterpret_cast<float4*>(part.to);
    for (std::size_t i = first; i < part.count / 4; i += stride) to[i] = from[i];
  } else {
    for (std::size_t i = first; i < part.count; i += stride) part.to[i] = part.from[i];
  }
}

__global__ void fill_rows_kernel(float* x, const float* row, int stride, int first, int dim) {
  const std::size_t at = static_cast<std::size_t>(blockIdx.y) * stride + first + blockIdx.x;
  for (int i = threadIdx.x; i < dim; i += kThreads) x[at * dim + i] = row[i];
}

}  // namespace

void copy_rows(const CopyRows& args, cudaStream_t stream) {
  std::size_t largest = 0;
  for (int i = 0; i < args.count; ++i) largest = std::max(largest, args.parts[i].count);
  if (largest == 0) return;
  const std::size_t blocks = std::min(kMostBlocks, (largest + 4 * kThreads - 1) / (4 * kThreads));
  copy_rows_kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.count)),
                     kThreads, 0, stream>>>(args);
  ZRT_LAUNCHED();
}

void fill_rows(float* x, const float* row, int samples, int stride, int first, int count, int dim,
               cudaStream_t stream) {
  if (count == 0) return;
  fill_rows_kernel<<<dim3(count, samples), kThreads, 0, stream>>>(x, row, stride, first, dim);
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
