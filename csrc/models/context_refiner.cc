#include <cstddef>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/dtype.h"
#include "kernels/copy_rows.h"
#include "kernels/norm.h"
#include "kernels/rope_table.h"
#include "models/transformer.h"
#include "ops/linear.h"

namespace zimage_rt {
namespace {

std::vector<BlockModulation> norms_of(const TransformerConfig& config, const Weights& weights) {
  std::vector<BlockModulation> vectors;
  for (int i = 0; i < config.n_refiner_layers; ++i) {
    const std::string layer = "context_refiner." + std::to_string(i) + ".";
    const auto norm = [&](const char* name) {
      return weights.vector(layer + name + ".weight", config.dim);
    };
    vectors.push_back({.pre_attention = norm("attention_norm1"),
                       .post_attention = norm("attention_norm2"),
                       .pre_ffn = norm("ffn_norm1"),
                       .post_ffn = norm("ffn_norm2")});
  }
  return vectors;
}

}  // namespace

ContextRefiner::ContextRefiner(const TransformerConfig& config, const Weights& weights)
    : config_(config),
      shape_(config.block_shape(weights.storage())),
      norms_(norms_of(config, weights)),
      tensors_(tensors_of(config, weights)) {
  for (int i = 0; i < config.n_refiner_layers; ++i)
    blocks_.push_back(
        block_weights(config, shape_, weights, "context_refiner." + std::to_string(i) + "."));
}

ContextRefiner::Tensors ContextRefiner::tensors_of(const TransformerConfig& config,
                                                   const Weights& weights) {
  const int in = config.cap_feat_dim, dim = config.dim;
  Tensors out{};
  out.norm = weights.vector("cap_embedder.0.weight", in);
  out.embed = weights.matrix("cap_embedder.1.weight", in, dim);
  out.embed_bias = weights.vector("cap_embedder.1.bias", dim);
  out.pad = weights.get("cap_pad_token", {1, dim}, DType::kFloat32).f32();
  out.positions = rope_axes(config, weights, 1)[0];
  return out;
}

ContextRefiner::Buffers ContextRefiner::plan(int tokens, Arena& arena) const {
  const auto rows = static_cast<std::size_t>(padded_tokens(tokens));
  return {.context = arena.take<float>(rows * config_.dim),
          .normed = arena.take(rows * config_.cap_feat_dim * size_of(shape_.type)),
          .cos = arena.take<float>(rows * shape_.head_dim / 2),
          .sin = arena.take<float>(rows * shape_.head_dim / 2),
          .block = BlockBuffers(shape_, rows, arena)};
}

void ContextRefiner::run(const float* prompt_embeds, int tokens, const Buffers& buffers,
                         const Ops& ops) const {
  const int rows = padded_tokens(tokens);
  rms_norm({.x = prompt_embeds,
            .weight = tensors_.norm,
            .out = buffers.normed,
            .type = shape_.type,
            .rows = tokens,
            .dim = config_.cap_feat_dim,
            .eps = config_.norm_eps},
           ops.stream);
  // All padded rows, so that one timing serves every length; rows after the prompt are replaced.
  linear({.x = buffers.normed,
          .weight = tensors_.embed,
          .bias = tensors_.embed_bias,
          .out = buffers.context,
          .out_type = DType::kFloat32,
          .rows = rows},
         ops);
  fill_rows(buffers.context, tensors_.pad, 1, rows, tokens, rows - tokens, config_.dim, ops.stream);

  RopeTable table{};
  table.axes[0] = tensors_.positions;
  // A caption has position 0 on the other axes: no rotation.
  for (int i = 1; i < kRopeAxes; ++i) table.axes[i].size = config_.axes_dims[i] / 2;
  table.grid_rows = table.grid_columns = 1;
  table.context_tokens = rows;
  table.cos = buffers.cos, table.sin = buffers.sin;
  rope_table(table, ops.stream);
  const Sequences sequence{.rows = rows,
                           .groups = {{.first_row = 0, .sequences = 1, .tokens = rows}},
                           .rope = {buffers.cos, buffers.sin}};
  run_blocks(shape_, blocks_, norms_, buffers.context, sequence, buffers.block, ops);
}

}  // namespace zimage_rt
