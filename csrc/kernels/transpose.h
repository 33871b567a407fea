#pragma once

#include <cuda_runtime_api.h>

namespace zimage_rt {

// Rows and columns of the tile that a block transposes.
constexpr int kTransposeTile = 64;

// out [columns, rows] = inᵀ, of in [rows, columns]; elements of `element_bytes`, 1 or 2. Rows of
// `out` are `out_stride` elements apart. The two must not overlap.
void transpose(const void* in, void* out, int element_bytes, int rows, int columns, int out_stride,
               cudaStream_t stream);

}  // namespace zimage_rt
