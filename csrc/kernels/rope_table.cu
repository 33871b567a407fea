#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>

#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/rope_table.h"

namespace zimage_rt {
namespace {

__global__ void rope_table_kernel(RopeTable args) {
  const int row = blockIdx.x;
  const int grid = args.grid_rows * args.grid_columns;
  const bool image = row < args.image_tokens, pad = image && row >= grid;
  const int ids[kRopeAxes] = {image ? args.context_tokens + 1 : row - args.image_tokens + 1,
                              image ? row / args.grid_columns : 0,
                              image ? row % args.grid_columns : 0};
  int column = threadIdx.x, width = 0;
  for (const RopeAxis& axis : args.axes) width += axis.size;
  if (column >= width) return;
  const std::size_t out = static_cast<std::size_t>(row) * width + column;
  int i = 0;
  while (column >= args.axes[i].size) column -= args.axes[i++].size;
  const int at = ids[i] * args.axes[i].size + column;
  const bool rotated = !pad && args.axes[i].cos != nullptr;
  args.cos[out] = rotated ? args.axes[i].cos[at] : 1.0f;
  args.sin[out] = rotated ? args.axes[i].sin[at] : 0.0f;
}

__global__ void position_table_kernel(const float* inv_freq, int size, float* cos, float* sin) {
  if (threadIdx.x >= size) return;
  const float angle = static_cast<float>(blockIdx.x) * inv_freq[threadIdx.x];
  cos[blockIdx.x * size + threadIdx.x] = cosf(angle);
  sin[blockIdx.x * size + threadIdx.x] = sinf(angle);
}

}  // namespace

void rope_table(const RopeTable& args, cudaStream_t stream) {
  const int largest[kRopeAxes] = {args.context_tokens + 1, args.grid_rows - 1,
                                  args.grid_columns - 1};
  int width = 0;
  for (int i = 0; i < kRopeAxes; ++i) {
    width += args.axes[i].size;
    // The context alone (no image rows) needs only its own ids of the first axis.
    const int last = i == 0 && args.image_tokens == 0 ? args.context_tokens : largest[i];
    if (args.axes[i].cos != nullptr && last >= args.axes[i].length)
      throw std::invalid_argument("rope_table: a position is outside of the checkpoint's tables");
  }
  if (width > 1024) throw std::invalid_argument("rope_table: heads too wide");
  rope_table_kernel<<<args.image_tokens + args.context_tokens, ceil_div(width, 32) * 32, 0,
                      stream>>>(args);
  ZRT_LAUNCHED();
}

void position_table(const float* inv_freq, int size, int rows, float* cos, float* sin,
                    cudaStream_t stream) {
  position_table_kernel<<<rows, ceil_div(size, 32) * 32, 0, stream>>>(inv_freq, size, cos, sin);
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
