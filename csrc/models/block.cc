#include "models/block.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/arena.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/norm.h"
#include "kernels/quantize_rows.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "weights/streamed_blocks.h"

namespace zimage_rt {
namespace {

const std::byte* at(const void* data, std::size_t elements, DType type) {
  return static_cast<const std::byte*>(data) + elements * size_of(type);
}

// The input of an 8-bit matrix, written by the pass before it; without memory for a 16-bit one.
QuantizedRows input_of(const Matrix& weight, const BlockBuffers& buffers) {
  if (!is_8bit(weight.dtype)) return {};
  return {.data = buffers.quantized,
          .scales = buffers.quantized_scales,
          .dtype = weight.dtype,
          .rotation = weight.rotation};
}

void attend(const BlockShape& shape, const BlockWeights& weights, const Sequences& sequences,
            const BlockBuffers& buffers, const Ops& ops) {
  const int width = shape.qkv_width(), out_width = shape.heads * shape.head_dim;
  linear_qk_norm_rope({.x = buffers.normed,
                       .quantized = input_of(weights.qkv, buffers),
                       .weight = weights.qkv,
                       .qkv = buffers.wide,
                       .type = shape.type,
                       .rows = sequences.rows,
                       .q_norm = weights.q_norm,
                       .k_norm = weights.k_norm,
                       .cos = sequences.rope.cos,
                       .sin = sequences.rope.sin,
                       .heads = shape.heads,
                       .kv_heads = shape.kv_heads,
                       .head_dim = shape.head_dim,
                       .eps = shape.qk_norm_eps},
                      ops);

  for (const SequenceGroup& group : sequences.groups) {
    const std::size_t first = static_cast<std::size_t>(group.first_row);
    const std::byte* const q = at(buffers.wide, first * width, shape.type);
    const std::byte* const k = at(q, static_cast<std::size_t>(out_width), shape.type);
    attention({.q = q,
               .k = k,
               .v = at(k, static_cast<std::size_t>(shape.kv_heads) * shape.head_dim, shape.type),
               .out = const_cast<std::byte*>(at(buffers.normed, first * out_width, shape.type)),
               .type = shape.type,
               .batch = group.sequences,
               .tokens = group.tokens,
               .heads = shape.heads,
               .kv_heads = shape.kv_heads,
               .head_dim = shape.head_dim,
               .token_stride = width,
               .batch_stride = static_cast<std::int64_t>(group.tokens) * width,
               .out_token_stride = out_width,
               .out_batch_stride = static_cast<std::int64_t>(group.tokens) * out_width,
               .causal = shape.causal},
              ops);
  }

  const QuantizedRows attended = input_of(weights.out, buffers);
  if (attended.data != nullptr)
    quantize_rows({.x = buffers.normed,
                   .type = shape.type,
                   .rows = sequences.rows,
                   .columns = weights.out.in,
                   .out = attended},
                  ops.stream);
  // The scale is applied to the fp32 sums, so that the branch fits the format.
  linear({.x = buffers.normed,
          .quantized = attended,
          .weight = weights.out,
          .out = buffers.branch,
          .out_type = shape.type,
          .rows = sequences.rows,
          .alpha = shape.attention_scale},
         ops);
}

void feed_forward(const BlockShape& shape, const BlockWeights& weights, int rows,
                  const BlockBuffers& buffers, const Ops& ops) {
  linear_swiglu({.x = buffers.normed,
                 .quantized = input_of(weights.gate_up, buffers),
                 .weight = weights.gate_up,
                 .gate_up = buffers.wide,
                 .out = buffers.hidden,
                 .type = shape.type,
                 .rows = rows,
                 .gate_scale = shape.gate_scale,
                 .up_scale = shape.up_scale,
                 .quantized_out = input_of(weights.down, buffers)},
                ops);
  linear({.x = buffers.hidden,
          .quantized = input_of(weights.down, buffers),
          .weight = weights.down,
          .out = buffers.branch,
          .out_type = shape.type,
          .rows = rows},
         ops);
}

}  // namespace

BlockBuffers::BlockBuffers(const BlockShape& shape, std::size_t rows, Arena& arena) {
  const std::size_t row = rows * size_of(shape.type);
  const int attended = shape.heads * shape.head_dim;
  normed = arena.take(row * std::max(shape.dim, attended));
  wide = arena.take(row * std::max(shape.qkv_width(), 2 * shape.hidden));
  hidden = arena.take(row * shape.hidden);
  branch = arena.take(row * shape.dim);
  if (shape.has_8bit) {
    quantized = arena.take(rows * std::max({shape.dim, attended, shape.hidden}));
    quantized_scales = arena.take<float>(rows);
  }
}

void run_blocks(const BlockShape& shape, const std::vector<BlockWeights>& blocks,
                const std::vector<BlockModulation>& modulations, float* x,
                const Sequences& sequences, const BlockBuffers& buffers, const Ops& ops,
                const BlockStream& streamed) {
  if (blocks.empty()) return;
  const int rows = sequences.rows;
  // Ends a branch and begins the next one. A scaled branch is normed with a scaled eps or, without
  // a norm, unscaled as it is added.
  const auto join = [&](float scale, const float* post, const float* pre, const Matrix* next) {
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
                   .dim = shape.dim,
                   .quantized = next == nullptr ? QuantizedRows{} : input_of(*next, buffers)},
                  ops.stream);
  };
  rms_norm({.x = x,
            .weight = modulations[0].pre_attention,
            .out = buffers.normed,
            .type = shape.type,
            .rows = rows,
            .dim = shape.dim,
            .eps = shape.norm_eps,
            .quantized = input_of(blocks[0].qkv, buffers)},
           ops.stream);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const int number = streamed.first + static_cast<int>(i);
    if (streamed.blocks != nullptr) streamed.blocks->before(number, ops.stream);
    attend(shape, blocks[i], sequences, buffers, ops);
    join(shape.attention_scale, modulations[i].post_attention, modulations[i].pre_ffn,
         &blocks[i].gate_up);
    feed_forward(shape, blocks[i], rows, buffers, ops);
    if (streamed.blocks != nullptr) streamed.blocks->after(number, ops.stream);
    const bool is_last = i + 1 == blocks.size();
    join(shape.gate_scale * shape.up_scale, modulations[i].post_ffn,
         is_last ? nullptr : modulations[i + 1].pre_attention,
         is_last ? nullptr : &blocks[i + 1].qkv);
  }
}

}  // namespace zimage_rt
