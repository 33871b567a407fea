#include "ops/linear.h"

#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/fused_gemm.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/swiglu.h"
#include "ops/cublaslt_gemm.h"

namespace zimage_rt {
namespace {

// With fewer rows the smaller tiles of cuBLASLt are faster (benchmarks/LOG.md).
constexpr int kFusedRows = 2048;
// Columns of a head, and of a tile of the hidden layer, that the fused products compute.
constexpr int kFusedHeadDim = 128;
constexpr int kFusedHiddenMultiple = 64;

void check_weight(const Matrix& weight) {
  if (weight.dtype == DType::kFloat32 || weight.scales != nullptr)
    throw WeightError(
        "a matrix product: expected weights in fp16 or bf16 without scales; export the bundle "
        "again");
}

bool can_fuse(const Ops& ops, int rows) {
  return ops.fused_workspace != nullptr && rows >= kFusedRows;
}

FusedGemm fused_gemm(const void* x, const Matrix& weight, int rows, void* out, const Ops& ops) {
  return {.a = x,
          .weight = weight.data,
          .out = out,
          .type = weight.dtype,
          .m = rows,
          .n = weight.out,
          .k = weight.in,
          .workspace = ops.fused_workspace,
          .layout = weight.layout};
}

}  // namespace

void linear(const LinearArgs& args, const Ops& ops) {
  check_weight(args.weight);
  ops.gemm.run(args, ops.stream);
}

void linear_swiglu(const LinearSwiGluArgs& args, const Ops& ops) {
  check_weight(args.weight);
  const int hidden = args.weight.out / 2;
  if (can_fuse(ops, args.rows) && hidden % kFusedHiddenMultiple == 0) {
    gemm_swiglu(fused_gemm(args.x, args.weight, args.rows, args.out, ops),
                args.gate_scale * args.up_scale, ops.stream);
    return;
  }
  linear({.x = args.x,
          .weight = args.weight,
          .out = args.gate_up,
          .out_type = args.weight.dtype,
          .rows = args.rows},
         ops);
  swiglu({.gate_up = args.gate_up,
          .out = args.out,
          .type = args.weight.dtype,
          .rows = args.rows,
          .hidden = hidden,
          .gate_scale = args.gate_scale,
          .up_scale = args.up_scale},
         ops.stream);
}

void linear_qk_norm_rope(const LinearQkNormRopeArgs& args, const Ops& ops) {
  check_weight(args.weight);
  if (can_fuse(ops, args.rows) && args.head_dim == kFusedHeadDim) {
    gemm_qk_norm_rope(fused_gemm(args.x, args.weight, args.rows, args.qkv, ops),
                      {.q_weight = args.q_norm,
                       .k_weight = args.k_norm,
                       .cos = args.cos,
                       .sin = args.sin,
                       .q_heads = args.heads,
                       .k_heads = args.kv_heads,
                       .eps = args.eps},
                      ops.stream);
    return;
  }
  linear({.x = args.x,
          .weight = args.weight,
          .out = args.qkv,
          .out_type = args.weight.dtype,
          .rows = args.rows},
         ops);
  qk_norm_rope({.qkv = args.qkv,
                .row_stride = args.weight.out,
                .type = args.weight.dtype,
                .q_weight = args.q_norm,
                .k_weight = args.k_norm,
                .cos = args.cos,
                .sin = args.sin,
                .rows = args.rows,
                .q_heads = args.heads,
                .k_heads = args.kv_heads,
                .head_dim = args.head_dim,
                .eps = args.eps},
               ops.stream);
}

const void* in_out_data(const Matrix& matrix) {
  check_weight(matrix);
  if (matrix.layout != Layout::kInOut)
    throw WeightError("a modulation: expected weights stored as [in, out]");
  return matrix.data;
}

}  // namespace zimage_rt
