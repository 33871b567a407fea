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

template <typename T>
__global__ void transpose_kernel(const T* in, T* out, int rows, int columns, int out_stride) {
  // Padded by a word, so that the elements of a column are in different banks.
  __shared__ T tile[kTile][kTile + 4 / sizeof(T)];
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

template <typename T>
void launch(const void* in, void* out, int rows, int columns, int out_stride, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(columns, kTile)),
                    static_cast<unsigned>(ceil_div(rows, kTile)));
  transpose_kernel<<<blocks, kTile * kRowsAtOnce, 0, stream>>>(
      static_cast<const T*>(in), static_cast<T*>(out), rows, columns, out_stride);
  ZRT_LAUNCHED();
}

}  // namespace

void transpose(const void* in, void* out, int element_bytes, int rows, int columns, int out_stride,
               cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  if (element_bytes == 1)
    launch<std::uint8_t>(in, out, rows, columns, out_stride, stream);
  else
    launch<std::uint16_t>(in, out, rows, columns, out_stride, stream);
}

}  // namespace zimage_rt
