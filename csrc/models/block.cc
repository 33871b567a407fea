#include "models/block.h"

#include <algorithm>
#include <cstdint>

#include "device/matrix.h"
#include "kernels/fused_gemm.h"
#include "kernels/norm.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/swiglu.h"

namespace zimage_rt {
namespace {

// With fewer rows cuBLASLt's smaller tiles are faster (benchmarks/LOG.md).
constexpr int kFusedRows = 2048;

const std::byte* at(const void* data, std::size_t elements, DType type) {
  return static_cast<const std::byte*>(data) + elements * size_of(type);
}

bool fuses(const Ops& ops, int rows) { return ops.fused != nullptr && rows >= kFusedRows; }

// The same product for kernels/fused_gemm.h, into `out`.
FusedGemm fused(const GemmArgs& args, void* out, const Ops& ops) {
  return {.a = args.a,
          .weight = args.weight,
          .out = out,
          .type = args.type,
          .m = args.m,
          .n = args.n,
          .k = args.k,
          .workspace = ops.fused,
          .layout = args.turned ? Layout::kOutIn : Layout::kInOut};
}

void attend(const BlockShape& shape, const BlockWeights& weights, int rows,
            const std::vector<SequenceGroup>& groups, const RopeView& rope,
            const BlockBuffers& buffers, const Ops& ops) {
  const int width = shape.qkv_width(), out_width = shape.heads * shape.head_dim;
  GemmArgs qkv{};
  qkv.a = buffers.normed;
  qkv.weight = weights.qkv;
  qkv.out = buffers.wide;
  qkv.type = qkv.out_type = shape.type;
  qkv.m = rows, qkv.n = width, qkv.k = shape.dim;
  qkv.turned = weights.turned;
  if (fuses(ops, rows) && shape.head_dim == 128) {
    gemm_qk_norm_rope(fused(qkv, qkv.out, ops),
                      {.q_weight = weights.q_norm,
                       .k_weight = weights.k_norm,
                       .cos = rope.cos,
                       .sin = rope.sin,
                       .q_heads = shape.heads,
                       .k_heads = shape.kv_heads,
                       .eps = shape.qk_norm_eps},
                      ops.stream);
  } else {
    ops.gemm.run(qkv, ops.stream);
    qk_norm_rope({.qkv = buffers.wide,
                  .row_stride = width,
                  .type = shape.type,
                  .q_weight = weights.q_norm,
                  .k_weight = weights.k_norm,
                  .cos = rope.cos,
                  .sin = rope.sin,
                  .rows = rows,
                  .q_heads = shape.heads,
                  .k_heads = shape.kv_heads,
                  .head_dim = shape.head_dim,
                  .eps = shape.qk_norm_eps},
                 ops.stream);
  }

  for (const SequenceGroup& group : groups) {
    const std::size_t first = static_cast<std::size_t>(group.first_row);
    const std::byte* const q = at(buffers.wide, first * width, shape.type);
    AttentionArgs args{};
    args.q = q;
    args.k = at(q, static_cast<std::size_t>(out_width), shape.type);
    args.v = at(args.k, static_cast<std::size_t>(shape.kv_heads) * shape.head_dim, shape.type);
    args.out = const_cast<std::byte*>(at(buffers.normed, first * out_width, shape.type));
    args.type = shape.type;
    args.batch = group.sequences;
    args.tokens = group.tokens;
    args.heads = shape.heads;
    args.kv_heads = shape.kv_heads;
    args.head_dim = shape.head_dim;
    args.token_stride = width;
    args.batch_stride = static_cast<std::int64_t>(group.tokens) * width;
    args.out_token_stride = out_width;
    args.out_batch_stride = static_cast<std::int64_t>(group.tokens) * out_width;
    args.causal = shape.causal;
    ops.attention.run(args, ops.stream);
  }

  GemmArgs out = qkv;
  out.weight = weights.out;
  out.out = buffers.branch;
  out.n = shape.dim, out.k = out_width;
  // In the fp32 sum: the branch comes out scaled, and what leaves the sum fits the format.
  out.alpha = shape.attention_scale;
  ops.gemm.run(out, ops.stream);
}

void feed_forward(const BlockShape& shape, const BlockWeights& weights, int rows,
                  const BlockBuffers& buffers, const Ops& ops) {
  GemmArgs up{};
  up.a = buffers.normed;
  up.weight = weights.gate_up;
  up.out = buffers.wide;
  up.type = up.out_type = shape.type;
  up.m = rows, up.n = 2 * shape.hidden, up.k = shape.dim;
  up.turned = weights.turned;
  if (fuses(ops, rows) && shape.hidden % 64 == 0) {
    gemm_swiglu(fused(up, buffers.hidden, ops), shape.gate_scale * shape.up_scale, ops.stream);
  } else {
    ops.gemm.run(up, ops.stream);
    swiglu({.gate_up = buffers.wide,
            .out = buffers.hidden,
            .type = shape.type,
            .rows = rows,
            .hidden = shape.hidden,
            .gate_scale = shape.gate_scale,
            .up_scale = shape.up_scale},
           ops.stream);
  }
  GemmArgs down = up;
  down.a = buffers.hidden;
  down.weight = weights.down;
  down.out = buffers.branch;
  down.n = shape.dim, down.k = shape.hidden;
  ops.gemm.run(down, ops.stream);
}

}  // namespace

BlockBuffers::BlockBuffers(const BlockShape& shape, std::size_t rows, Arena& arena) {
  const std::size_t row = rows * size_of(shape.type);
  const int attended = shape.heads * shape.head_dim;
  normed = arena.take(row * std::max(shape.dim, attended));
  wide = arena.take(row * std::max(shape.qkv_width(), 2 * shape.hidden));
  hidden = arena.take(row * shape.hidden);
  branch = arena.take(row * shape.dim);
}

void run_blocks(const BlockShape& shape, const std::vector<BlockWeights>& blocks,
                const std::vector<BlockVectors>& vectors, float* x, int rows,
                const std::vector<SequenceGroup>& groups, const RopeView& rope,
                const BlockBuffers& buffers, const Ops& ops) {
  if (blocks.empty()) return;
  // Ends a branch and begins the next one. A scaled branch is normed with a scaled eps, or unscaled
  // before it is added.
  const auto join = [&](float scale, const float* post, const float* pre) {
    residual_norm({.x = x,
                   .branch = buffers.branch,
                   .post = post,
                   .post_eps = shape.norm_eps * scale * scale,
                   .branch_scale = 1.0f / scale,
                   .pre = pre,
                   .pre_eps = shape.norm_eps,
                   .out = buffers.normed,
                   .type = shape.type,
                   .rows = rows,
                   .dim = shape.dim},
                  ops.stream);
  };
  rms_norm({.x = x,
            .weight = vectors[0].pre_attention,
            .out = buffers.normed,
            .type = shape.type,
            .rows = rows,
            .dim = shape.dim,
            .eps = shape.norm_eps},
           ops.stream);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    attend(shape, blocks[i], rows, groups, rope, buffers, ops);
    join(shape.attention_scale, vectors[i].post_attention, vectors[i].pre_ffn);
    feed_forward(shape, blocks[i], rows, buffers, ops);
    join(shape.gate_scale * shape.up_scale, vectors[i].post_ffn,
         i + 1 < blocks.size() ? vectors[i + 1].pre_attention : nullptr);
  }
}

}  // namespace zimage_rt
