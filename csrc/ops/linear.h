#pragma once

#include "device/matrix.h"
#include "ops/linear_args.h"
#include "ops/ops.h"

namespace zimage_rt {

// Linear layers. Each function chooses the library or the kernel by the weight, the shapes and the
// device. All throw WeightError for a dtype or scales that no product takes; the first call of a
// shape may time candidates, which must not happen during a graph capture.

void linear(const LinearArgs& args, const Ops& ops);

// out [rows, hidden] = silu(gate) * gate_scale * up * up_scale with (gate, up) = x · weight.
struct LinearSwiGluArgs {
  const void* x;  // [rows, weight.in]
  Matrix weight;  // [in, 2 * hidden]: the columns of the gate, then those of up
  void* gate_up;  // [rows, 2 * hidden], scratch
  void* out;
  int rows;
  float gate_scale;
  float up_scale;
};
void linear_swiglu(const LinearSwiGluArgs& args, const Ops& ops);

// qkv [rows, weight.out] = x · weight, with queries and keys normed and rotated as in
// kernels/qk_norm_rope.h.
struct LinearQkNormRopeArgs {
  const void* x;  // [rows, weight.in]
  Matrix weight;  // [in, (heads + 2 * kv_heads) * head_dim]
  void* qkv;
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
