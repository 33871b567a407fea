#include "ops/linear.h"

#include <stdexcept>

#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/few_rows_gemm_8bit.h"
#include "kernels/fused_gemm.h"
#include "kernels/mma_gemm_8bit.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/quantize_rows.h"
#include "kernels/swiglu.h"
#include "ops/cublaslt_gemm.h"

namespace zimage_rt {
namespace {

// With fewer rows the smaller tiles of cuBLASLt are faster (benchmarks/LOG.md).
constexpr int kFusedRows = 2048;
// The fused product computes 128 rows at least (LOG.md).
constexpr int kFusedRows8bit = kFewRows + 1;
// Columns of a head, and of a tile of the hidden layer, that the fused products compute.
constexpr int kFusedHeadDim = 128;
constexpr int kFusedMultiple = 64;

void check_16bit(const Matrix& weight) {
  if (weight.dtype == DType::kFloat32 || is_8bit(weight.dtype) || weight.scales != nullptr)
    throw WeightError(
        "a matrix product: expected weights in fp16 or bf16 without scales; export the bundle "
        "again");
}

// Returns whether the product is one of 8-bit operands.
bool check_operands(const void* x, const QuantizedRows& quantized, const Matrix& weight) {
  if (!is_8bit(weight.dtype)) {
    check_16bit(weight);
    if (x == nullptr)
      throw std::invalid_argument("a matrix product: expected a 16-bit input of a 16-bit weight");
    return false;
  }
  if (weight.scales == nullptr || weight.layout != Layout::kOutIn)
    throw WeightError(
        "a matrix product: expected 8-bit weights with scales, stored as [out, in]; export the "
        "bundle again");
  if (quantized.data == nullptr || quantized.scales == nullptr || quantized.dtype != weight.dtype ||
      quantized.rotation != weight.rotation)
    throw std::invalid_argument(
        "a matrix product: expected an 8-bit input in the dtype and rotation of its weight");
  return true;
}

bool can_fuse(const Ops& ops, const Matrix& weight, int rows) {
  return ops.fused_workspace != nullptr &&
         rows >= (is_8bit(weight.dtype) ? kFusedRows8bit : kFusedRows);
}

FusedGemm fused_gemm(const void* x, const QuantizedRows& quantized, const Matrix& weight, int rows,
                     void* out, DType out_type, const Ops& ops) {
  return {.a = is_8bit(weight.dtype) ? quantized.data : x,
          .weight = weight.data,
          .out = out,
          .type = weight.dtype,
          .m = rows,
          .n = weight.out,
          .k = weight.in,
          .workspace = ops.fused_workspace,
          .layout = weight.layout,
          .out_type = out_type,
          .row_scales = quantized.scales,
          .column_scales = weight.scales};
}

// float8 has a third way, cuBLASLt's products with scales per row; its place is here.
void linear_8bit(const LinearArgs& args, const Ops& ops) {
  const Matrix& weight = args.weight;
  if (args.bias != nullptr)
    throw std::invalid_argument("a matrix product: expected no bias with 8-bit weights");
  if (can_fuse(ops, weight, args.rows) && weight.out % kFusedMultiple == 0) {
    gemm_8bit(fused_gemm(nullptr, args.quantized, weight, args.rows, args.out, args.out_type, ops),
              args.alpha, ops.stream);
    return;
  }
  if (!mma_gemm_8bit_runs_here(weight.dtype))
    throw WeightError(
        "float8 weights: expected a GPU of compute capability 8.9 or later; export the bundle in "
        "int8 or 16 bits");
  const Gemm8bit product{.a = args.quantized.data,
                         .row_scales = args.quantized.scales,
                         .weight = weight.data,
                         .column_scales = weight.scales,
                         .type = weight.dtype,
                         .out = args.out,
                         .out_type = args.out_type,
                         .m = args.rows,
                         .n = weight.out,
                         .k = weight.in,
                         .alpha = args.alpha,
                         .workspace = ops.split_workspace};
  if (ops.fused_workspace != nullptr && args.rows <= kFewRows)
    few_rows_gemm_8bit(product, ops.stream);
  else
    mma_gemm_8bit(product, ops.stream);
}

}  // namespace

void linear(const LinearArgs& args, const Ops& ops) {
  if (check_operands(args.x, args.quantized, args.weight))
    linear_8bit(args, ops);
  else
    ops.gemm.run(args, ops.stream);
}

void linear_swiglu(const LinearSwiGluArgs& args, const Ops& ops) {
  check_operands(args.x, args.quantized, args.weight);
  const int hidden = args.weight.out / 2;
  if (can_fuse(ops, args.weight, args.rows) && hidden % kFusedMultiple == 0) {
    gemm_swiglu(
        fused_gemm(args.x, args.quantized, args.weight, args.rows, args.out, args.type, ops),
        args.gate_scale * args.up_scale, ops.stream);
    if (args.quantized_out.data != nullptr)
      quantize_rows({.x = args.out,
                     .type = args.type,
                     .rows = args.rows,
                     .columns = hidden,
                     .out = args.quantized_out},
                    ops.stream);
    return;
  }
  linear({.x = args.x,
          .quantized = args.quantized,
          .weight = args.weight,
          .out = args.gate_up,
          .out_type = args.type,
          .rows = args.rows},
         ops);
  swiglu({.gate_up = args.gate_up,
          .out = args.out,
          .type = args.type,
          .rows = args.rows,
          .hidden = hidden,
          .gate_scale = args.gate_scale,
          .up_scale = args.up_scale,
          .quantized = args.quantized_out},
         ops.stream);
}

void linear_qk_norm_rope(const LinearQkNormRopeArgs& args, const Ops& ops) {
  check_operands(args.x, args.quantized, args.weight);
  if (can_fuse(ops, args.weight, args.rows) && args.head_dim == kFusedHeadDim) {
    gemm_qk_norm_rope(
        fused_gemm(args.x, args.quantized, args.weight, args.rows, args.qkv, args.type, ops),
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
          .quantized = args.quantized,
          .weight = args.weight,
          .out = args.qkv,
          .out_type = args.type,
          .rows = args.rows},
         ops);
  qk_norm_rope({.qkv = args.qkv,
                .row_stride = args.weight.out,
                .type = args.type,
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
  check_16bit(matrix);
  if (matrix.layout != Layout::kInOut)
    throw WeightError("a modulation: expected weights stored as [in, out]");
  return matrix.data;
}

}  // namespace zimage_rt
