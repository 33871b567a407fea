#include <algorithm>
#include <cstdint>

#include "device/check.h"
#include "kernels/copy_rows.h"

namespace zimage_rt {
namespace {

constexpr int kThreads = 256;
constexpr std::size_t kMostBlocks = 512;  // of a part; its threads then take several turns

// One row of blocks a part. Four numbers at once where the part allows it.
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

}  // namespace zimage_rt
