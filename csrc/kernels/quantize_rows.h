#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

constexpr int kQuantizedColumns = 16384;  // most columns of a row

// out = x [rows, columns] in 8 bits, rotated as `out.rotation` says. The scale of a row is its
// largest magnitude over that of the format, 127 or 448; numbers are rounded to nearest even. A row
// of zeros has the scale 0. columns is a multiple of 16, with a rotation of 256.
struct QuantizeRows {
  const void* x;
  DType type;  // fp16 or bf16
  int rows;
  int columns;
  QuantizedRows out;
};
void quantize_rows(const QuantizeRows& args, cudaStream_t stream);

}  // namespace zimage_rt
