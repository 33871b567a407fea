#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"

namespace zimage_rt {

// out [rows, hidden] = silu(gate) * gate_scale * up * up_scale, from gate_up [rows, 2 * hidden]
// with the columns of the gate first. Computed in fp32; the scales keep the result in the range of
// fp16.
struct SwiGlu {
  const void* gate_up;
  void* out;
  DType type;
  int rows;
  int hidden;  // a multiple of 8
  float gate_scale;
  float up_scale;
};
void swiglu(const SwiGlu& args, cudaStream_t stream);

}  // namespace zimage_rt
