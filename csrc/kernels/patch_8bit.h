#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

// Adds a change to some rows of an 8-bit matrix [out, in] with a scale per row, and rounds each of
// them once, with a new scale: row = quantize(row * scale + rotated(upᵀ @ down + delta)). Sets
// *overflow to 1 if a number is not finite.
struct Patch8bit {
  void* matrix;   // the first row that changes, [rows, in]
  float* scales;  // [rows]
  DType type;
  Rotation rotation;
  int rows;
  int in;  // at most kPatchColumns; with a rotation a multiple of kRotationColumns
  int rank;
  const float* down;   // [rank, in]
  const float* up;     // [rank, rows]
  const float* delta;  // [in, rows], or null
  int* overflow;
};
constexpr int kPatchColumns = 12288;
void patch_8bit(const Patch8bit& args, cudaStream_t stream);

}  // namespace zimage_rt
