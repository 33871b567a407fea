#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/quantize_rows.h"

namespace zimage_rt {

// out [rows, hidden] = silu(gate) * gate_scale * up * up_scale, from gate_up [rows, 2 * hidden]
// with the columns of the gate first. Computed in fp32; the scales keep the result in the range of
// fp16. If `quantized` has memory, the output is written there and `out` is not used; hidden is
// then a multiple of 16, with a rotation of 256, and at most kQuantizedColumns.
struct SwiGlu {
  const void* gate_up;
  void* out;
  DType type;
  int rows;
  int hidden;  // a multiple of 8
  float gate_scale;
  float up_scale;
  QuantizedRows quantized = {};
};
void swiglu(const SwiGlu& args, cudaStream_t stream);

}  // namespace zimage_rt
