#pragma once

#include <cuda_runtime_api.h>

namespace zimage_rt {

// Rows and columns that a block turns.
constexpr int kTurnTile = 64;

// out [columns, rows] = inᵀ of in [rows, columns], numbers of two bytes; rows of `out` begin
// `out_stride` numbers after one another. The two may not overlap.
void turn(const void* in, void* out, int rows, int columns, int out_stride, cudaStream_t stream);

}  // namespace zimage_rt
