#pragma once

#include "device/dtype.h"
#include "device/matrix.h"
#include "ops/linear_args.h"
#include "ops/ops.h"

namespace zimage_rt {

// Linear layers. Each function chooses the library or the kernel by the weight, the shapes and the
// device. `x` is the input of 16-bit weights, `quantized` that of 8-bit ones, which are stored as
// [out, in]. All throw WeightError for a weight that no product takes here, std::invalid_argument
// for an input that is not in the weight's dtype and rotation; the first call of a shape may time
// candidates, which must not happen during a graph capture.

void linear(const LinearArgs& args, const Ops& ops);

// out [rows, hidden] = silu(gate) * gate_scale * up * up_scale with (gate, up) = x · weight.
struct LinearSwiGluArgs {
  const void* x = nullptr;  // [rows, weight.in]
  QuantizedRows quantized = {};
  Matrix weight;  // [in, 2 * hidden]: the columns of the gate, then those of up
  void* gate_up;  // [rows, 2 * hidden], scratch
  void* out;
  DType type;  // of gate_up and out: fp16 or bf16, that of a 16-bit weight
  int rows;
  float gate_scale;
  float up_scale;
  // The result in 8 bits, if it has memory; `out` is then scratch. It may share the memory of
  // `quantized`.
  QuantizedRows quantized_out = {};
};
void linear_swiglu(const LinearSwiGluArgs& args, const Ops& ops);

// qkv [rows, weight.out] = x · weight, with queries and keys normed and rotated as in
// kernels/qk_norm_rope.h.
struct LinearQkNormRopeArgs {
  const void* x = nullptr;  // [rows, weight.in]
  QuantizedRows quantized = {};
  Matrix weight;  // [in, (heads + 2 * kv_heads) * head_dim]
  void* qkv;
  DType type;  // of qkv: fp16 or bf16, that of a 16-bit weight
  int rows;
  const float* q_norm;  // [head_dim]; null, like k_norm: rotation alone
  const float* k_norm;
  const float* cos;  // [rows, head_dim / 2]
  const float* sin;
  int heads;
  int kv_heads;
  int head_dim;
  float eps;
};
void linear_qk_norm_rope(const LinearQkNormRopeArgs& args, const Ops& ops);

// The data of a 16-bit [in, out] matrix, for kernels that take nothing else. Throws WeightError.
const void* in_out_data(const Matrix& matrix);

}  // namespace zimage_rt
