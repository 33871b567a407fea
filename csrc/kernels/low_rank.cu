#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/check.h"
#include "kernels/low_rank.h"
#include "kernels/numeric.cuh"

namespace zimage_rt {
namespace {

constexpr int kTile = 64;      // rows and columns of a block
constexpr int kRankTile = 16;  // ranks per iteration
constexpr int kSide = 16;      // threads in each direction
constexpr int kEach = kTile / kSide;

// A thread computes 4 x 4 sums that are 16 apart, so that a half-warp accesses neighbouring
// columns.
template <typename T>
__global__ void low_rank_kernel(LowRankUpdate args) {
  __shared__ float down[kRankTile][kTile];
  __shared__ float up[kRankTile][kTile];
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  float sums[kEach][kEach] = {};
  for (int first = 0; first < args.rank; first += kRankTile) {
    for (int i = threadIdx.x; i < kRankTile * kTile; i += kSide * kSide) {
      const int k = first + i / kTile, row = first_row + i % kTile,
                column = first_column + i % kTile;
      const bool inside = k < args.rank;
      down[i / kTile][i % kTile] = inside && row < args.rows
                                       ? args.down[static_cast<std::size_t>(k) * args.rows + row]
                                       : 0.0f;
      up[i / kTile][i % kTile] = inside && column < args.columns
                                     ? args.up[static_cast<std::size_t>(k) * args.columns + column]
                                     : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRankTile; ++k)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] += down[k][y + kSide * i] * up[k][x + kSide * j];
    __syncthreads();
  }
  T* const matrix = static_cast<T*>(args.matrix) + args.first_column;
  bool overflow = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int row = first_row + y + kSide * i, column = first_column + x + kSide * j;
      if (row >= args.rows || column >= args.columns) continue;
      if (args.delta != nullptr)
        sums[i][j] += args.delta[row * args.delta_row + column * args.delta_column];
      T& value = matrix[row * args.stride + column];
      value = static_cast<T>(static_cast<float>(value) + sums[i][j]);
      overflow = overflow || !isfinite(static_cast<float>(value));
    }
  if (overflow) *args.overflow = 1;
}

}  // namespace

void low_rank_update(const LowRankUpdate& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const dim3 blocks(static_cast<unsigned>(ceil_div(args.columns, kTile)),
                    static_cast<unsigned>(ceil_div(args.rows, kTile)));
  for_type(args.type, [&](auto tag) {
    low_rank_kernel<decltype(tag)><<<blocks, kSide * kSide, 0, stream>>>(args);
  });
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
