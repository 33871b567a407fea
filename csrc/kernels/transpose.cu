#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/transpose.h"

namespace zimage_rt {
namespace {

constexpr int kTile = kTransposeTile;
constexpr int kRowsAtOnce = 4;  // rows of a tile that a block reads or writes at a time

__global__ void transpose_kernel(const std::uint16_t* in, std::uint16_t* out, int rows, int columns,
                                 int out_stride) {
  // Padded by two elements, so that the elements of a column are in different banks.
  __shared__ std::uint16_t tile[kTile][kTile + 2];
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  for (int i = y; i < kTile; i += kRowsAtOnce)
    if (first_row + i < rows && first_column + x < columns)
      tile[i][x] = in[static_cast<std::size_t>(first_row + i) * columns + first_column + x];
  __syncthreads();
  for (int i = y; i < kTile; i += kRowsAtOnce)
    if (first_column + i < columns && first_row + x < rows)
      out[static_cast<std::size_t>(first_column + i) * out_stride + first_row + x] = tile[x][i];
}

}  // namespace

void transpose(const void* in, void* out, int rows, int columns, int out_stride,
               cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  const dim3 blocks(static_cast<unsigned>(ceil_div(columns, kTile)),
                    static_cast<unsigned>(ceil_div(rows, kTile)));
  transpose_kernel<<<blocks, kTile * kRowsAtOnce, 0, stream>>>(
      static_cast<const std::uint16_t*>(in), static_cast<std::uint16_t*>(out), rows, columns,
      out_stride);
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
