#pragma once

#include "device/dtype.h"

namespace zimage_rt {

// The storage order of a weight matrix, row-major: [in, out] or [out, in].
enum class Layout { kInOut, kOutIn };

// An orthonormal rotation of every kRotationColumns consecutive columns of activations, which
// spreads their outliers before they are rounded. Weights are stored with the same rotation along
// `in`; both matrices are symmetric, so that the rotations cancel in the product. kHadamard is
// Sylvester's matrix / 16. kConvRot is the fourth Kronecker power of
// [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2, as in ComfyUI's int8_convrot.
enum class Rotation { kNone, kHadamard, kConvRot };
constexpr int kRotationColumns = 256;

// A weight matrix on the device, for products x [rows, in] · matrix -> [rows, out].
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kBFloat16;
  Layout layout = Layout::kInOut;
  int in = 0;
  int out = 0;
  const float* scales = nullptr;  // [out], of 8-bit data; null for 16-bit data
  Rotation rotation = Rotation::kNone;
};

// Activations in 8 bits: value = data * scale of the row, in the rotated columns.
struct QuantizedRows {
  void* data = nullptr;     // [rows, columns]
  float* scales = nullptr;  // [rows]
  DType dtype = DType::kInt8;
  Rotation rotation = Rotation::kNone;
};

}  // namespace zimage_rt
