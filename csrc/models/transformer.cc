#include "models/transformer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "device/arena.h"
#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/copy_rows.h"
#include "kernels/norm.h"
#include "ops/linear.h"

namespace zimage_rt {
namespace {

// A block's matrices.
constexpr char kQkv[] = "attention.qkv.weight";
constexpr char kOut[] = "attention.to_out.0.weight";
constexpr char kGateUp[] = "feed_forward.w13.weight";
constexpr char kDown[] = "feed_forward.w2.weight";

void copy(void* target, const void* source, std::size_t bytes, cudaStream_t stream) {
  ZRT_CUDA(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream));
}

bool is_block_matrix(const std::string& name) {
  for (const std::string_view matrix : {kQkv, kOut, kGateUp, kDown})
    if (name.size() > matrix.size() &&
        std::string_view(name).substr(name.size() - matrix.size()) == matrix)
      return true;
  return false;
}

std::vector<std::string> layer_names(const TransformerConfig& config) {
  std::vector<std::string> names;
  for (int i = 0; i < config.n_refiner_layers; ++i)
    names.push_back("noise_refiner." + std::to_string(i) + ".");
  for (int i = 0; i < config.n_layers; ++i) names.push_back("layers." + std::to_string(i) + ".");
  return names;
}

}  // namespace

BlockShape TransformerConfig::block_shape(DType type) const {
  if (hidden_dim % 8 != 0)  // kernels read eight numbers at once
    throw std::invalid_argument(
        "transformer: expected a hidden size of the feed-forward layers that is a multiple of 8, "
        "got " +
        std::to_string(hidden_dim));
  return {.dim = dim,
          .heads = n_heads,
          .kv_heads = n_heads,
          .head_dim = dim / n_heads,
          .hidden = hidden_dim,
          .norm_eps = norm_eps,
          .qk_norm_eps = kQkNormEps,
          .causal = false,
          .type = type,
          .attention_scale = attention_scale,
          .gate_scale = gate_scale,
          .up_scale = up_scale,
          .has_8bit = quantization.is_on};
}

std::vector<RopeAxis> rope_axes(const TransformerConfig& config, const Weights& weights,
                                int count) {
  std::vector<RopeAxis> axes;
  for (int i = 0; i < count; ++i) {
    const int length = config.axes_lens[i], size = config.axes_dims[i] / 2;
    const auto table = [&](const char* name) {
      return weights
          .get(std::string("rope.") + name + std::to_string(i), {length, size}, DType::kFloat32)
          .f32();
    };
    axes.push_back({.cos = table("cos"), .sin = table("sin"), .length = length, .size = size});
  }
  return axes;
}

BlockWeights block_weights(const TransformerConfig& config, const BlockShape& shape,
                           const Weights& weights, const std::string& layer) {
  const auto matrix = [&](const char* name, int in, int out) {
    const Matrix found = weights.matrix(layer + name, in, out);
    if (is_8bit(found.dtype) && !shape.has_8bit)
      throw WeightError(layer + name + " has 8 bits, but the module's config does not say so");
    return found;
  };
  const auto norm = [&](const char* name) {
    return config.qk_norm ? weights.vector(layer + name, shape.head_dim) : nullptr;
  };
  return {.qkv = matrix(kQkv, shape.dim, shape.qkv_width()),
          .q_norm = norm("attention.norm_q.weight"),
          .k_norm = norm("attention.norm_k.weight"),
          .out = matrix(kOut, shape.dim, shape.dim),
          .gate_up = matrix(kGateUp, shape.dim, 2 * shape.hidden),
          .down = matrix(kDown, shape.hidden, shape.dim)};
}

void transpose_block_matrices(Weights& weights) { weights.transpose_on_upload(is_block_matrix); }

void split_layers(const TransformerConfig& config, Weights& weights) {
  weights.split_blocks([&](const std::string& name) {
    int layer = -1;
    const bool found =
        is_block_matrix(name) && std::sscanf(name.c_str(), "layers.%d.", &layer) == 1;
    return found && layer >= 0 && layer < config.n_layers ? layer : -1;
  });
}

Transformer::Transformer(const TransformerConfig& config, const Weights& weights)
    : config_(config),
      shape_(config.block_shape(weights.storage())),
      blocks_(config, weights, layer_names(config), "the transformer's modulation table"),
      axes_(rope_axes(config, weights, kRopeAxes)),
      tensors_(tensors_of(config, weights, blocks_.width())),
      streamed_(weights.blocks()) {}

void Transformer::stream_layers(int count, const Weights& weights, cudaStream_t stream) {
  streamed_->move(count, stream);
  blocks_.find_matrices(config_, weights, layer_names(config_));
}

Transformer::Tensors Transformer::tensors_of(const TransformerConfig& config,
                                             const Weights& weights, int width) {
  const auto vector = [&](const std::string& name, int size) { return weights.vector(name, size); };
  const auto matrix = [&](const std::string& name, int in, int out) {
    return weights.matrix(name, in, out);
  };
  const int dim = config.dim;
  const int features = config.patch_size * config.patch_size * config.in_channels;
  const std::string patch = std::to_string(config.patch_size) + "-1.";
  const std::string embedder = "all_x_embedder." + patch, last = "all_final_layer." + patch;
  Tensors out{};
  // Every size comes from one tensor, and the others are checked against it.
  out.half = weights.axis("t_embedder.constants.frequencies", 1, 0);
  out.middle = weights.axis("t_embedder.mlp.0.bias", 1, 0);
  out.frequencies = vector("t_embedder.constants.frequencies", out.half);
  out.timestep1 = matrix("t_embedder.mlp.0.weight", 2 * out.half, out.middle);
  out.timestep1_bias = vector("t_embedder.mlp.0.bias", out.middle);
  out.timestep2 = matrix("t_embedder.mlp.2.weight", out.middle, width);
  out.timestep2_bias = vector("t_embedder.mlp.2.bias", width);
  out.embedder = {.channels = config.in_channels,
                  .weight = matrix(embedder + "weight", features, dim),
                  .bias = vector(embedder + "bias", dim)};
  out.pad = weights.get("x_pad_token", {1, dim}, DType::kFloat32).f32();
  out.last_modulation = matrix(last + "adaLN_modulation.1.weight", width, dim);
  out.last_modulation_bias = vector(last + "adaLN_modulation.1.bias", dim);
  out.last = matrix(last + "linear.weight", dim, features);
  out.last_bias = vector(last + "linear.bias", features);
  return out;
}

PatchGrid Transformer::grid(const SampleShape& shape) const {
  return {.channels = config_.in_channels,
          .height = shape.latent_height,
          .width = shape.latent_width,
          .patch = config_.patch_size};
}

int Transformer::rows(const SampleShape& shape, int samples) const {
  const int context =
      std::accumulate(shape.context_tokens.begin(), shape.context_tokens.begin() + samples, 0);
  return samples * image_tokens(shape) + context;
}

Transformer::Buffers Transformer::plan(const SampleShape& shape, Arena& arena) const {
  const auto samples = static_cast<int>(shape.context_tokens.size());
  const auto all = static_cast<std::size_t>(rows(shape, samples));
  const auto dim = static_cast<std::size_t>(config_.dim);
  const PatchGrid patches = grid(shape);
  const std::size_t image = static_cast<std::size_t>(samples) * image_tokens(shape);
  const std::size_t half = shape_.head_dim / 2;
  float* const contexts = arena.take<float>((all - image) * dim);
  float* const vectors = arena.take<float>(blocks_.step_vectors());
  float* const scales = arena.take<float>(dim);
  float* const cos = arena.take<float>(all * half);
  float* const sin = arena.take<float>(all * half);
  float* const x = arena.take<float>(all * dim);
  const bool single = samples == 1;
  return {.contexts = contexts,
          .vectors = vectors,
          .scales = scales,
          .cos = cos,
          .sin = sin,
          .image_cos = single ? cos : arena.take<float>(image * half),
          .image_sin = single ? sin : arena.take<float>(image * half),
          .x = x,
          .image_x = single ? x : arena.take<float>(image * dim),
          .patches = arena.take(image * patches.features() * size_of(shape_.type)),
          .predicted = arena.take<float>(static_cast<std::size_t>(samples) * patches.values()),
          .block = BlockBuffers(shape_, all, arena)};
}

Transformer::StepTable Transformer::plan_steps(int steps, Arena& arena) const {
  const auto count = static_cast<std::size_t>(steps);
  StepTable table{};
  table.timesteps = arena.take<float>(count);
  table.embedding = arena.take<float>(count * width());
  table.vectors = arena.take<float>(count * blocks_.step_vectors());
  table.scales = arena.take<float>(count * config_.dim);
  return table;
}

void Transformer::prepare_steps(const StepTable& table, int steps, const Ops& ops) const {
  timestep_embedding({.timesteps = table.timesteps,
                      .t_scale = config_.t_scale,
                      .frequencies = tensors_.frequencies,
                      .half = tensors_.half,
                      .weight1 = in_out_data(tensors_.timestep1),
                      .bias1 = tensors_.timestep1_bias,
                      .middle = tensors_.middle,
                      .weight2 = in_out_data(tensors_.timestep2),
                      .bias2 = tensors_.timestep2_bias,
                      .width = width(),
                      .type = shape_.type,
                      .out = table.embedding,
                      .steps = steps},
                     ops.stream);
  blocks_.prepare(table.embedding, steps, table.vectors, ops.stream);
  final_modulation({.embedding = table.embedding,
                    .weight = in_out_data(tensors_.last_modulation),
                    .bias = tensors_.last_modulation_bias,
                    .width = width(),
                    .dim = config_.dim,
                    .type = shape_.type,
                    .scales = table.scales,
                    .steps = steps},
                   ops.stream);
}

void Transformer::prepare(const SampleShape& shape, const Buffers& buffers, const Ops& ops) const {
  const PatchGrid patches = grid(shape);
  const int padded = image_tokens(shape), half = shape_.head_dim / 2;
  std::size_t row = 0;
  for (std::size_t i = 0; i < shape.context_tokens.size(); ++i) {
    const RopeTable table{.axes = {axes_[0], axes_[1], axes_[2]},
                          .grid_rows = patches.height / patches.patch,
                          .grid_columns = patches.width / patches.patch,
                          .image_tokens = padded,
                          .context_tokens = shape.context_tokens[i],
                          .cos = buffers.cos + row * half,
                          .sin = buffers.sin + row * half};
    rope_table(table, ops.stream);
    if (buffers.image_cos != buffers.cos) {
      const std::size_t size = static_cast<std::size_t>(padded) * half;
      copy(buffers.image_cos + i * size, table.cos, size * sizeof(float), ops.stream);
      copy(buffers.image_sin + i * size, table.sin, size * sizeof(float), ops.stream);
    }
    row += static_cast<std::size_t>(padded + shape.context_tokens[i]);
  }
}

void Transformer::evaluate(const Evaluation& at, const float* latents) const {
  const Buffers& buffers = at.buffers;
  begin(at);
  embed(at, embedder(), latents, buffers.patches, buffers.image_x);
  refine(at, 0, config_.n_refiner_layers, buffers.image_x);
  join(at, buffers.image_x, buffers.x);
  run_layers(at, 0, config_.n_layers);
  predict(at);
}

void Transformer::begin(const Evaluation& at) const {
  if (streamed_ != nullptr) streamed_->begin(at.ops.stream);
}

void Transformer::embed(const Evaluation& at, const Embedder& embedder, const float* latents,
                        void* patches, float* image_x) const {
  PatchGrid cells = grid(at.shape);
  cells.channels = embedder.channels;
  const int dim = config_.dim, padded = image_tokens(at.shape);
  patchify(latents, at.shape.latent_samples, cells, patches, shape_.type, at.samples, padded,
           at.ops.stream);
  linear({.x = patches,
          .weight = embedder.weight,
          .bias = embedder.bias,
          .out = image_x,
          .out_type = DType::kFloat32,
          .rows = at.samples * padded},
         at.ops);
  fill_rows(image_x, tensors_.pad, at.samples, padded, cells.rows(), padded - cells.rows(), dim,
            at.ops.stream);
}

Sequences Transformer::image_sequences(const Evaluation& at) const {
  const int tokens = image_tokens(at.shape);
  return {.rows = at.samples * tokens,
          .groups = {{.first_row = 0, .sequences = at.samples, .tokens = tokens}},
          .rope = {at.buffers.image_cos, at.buffers.image_sin}};
}

Sequences Transformer::sequences(const Evaluation& at) const {
  // Per sample the image rows, then the context. Neighbours of the same length form a group.
  std::vector<SequenceGroup> groups;
  int row = 0;
  for (int i = 0; i < at.samples; ++i) {
    const int tokens = image_tokens(at.shape) + at.shape.context_tokens[i];
    if (!groups.empty() && groups.back().tokens == tokens)
      ++groups.back().sequences;
    else
      groups.push_back({.first_row = row, .sequences = 1, .tokens = tokens});
    row += tokens;
  }
  return {.rows = row, .groups = std::move(groups), .rope = {at.buffers.cos, at.buffers.sin}};
}

void Transformer::refine(const Evaluation& at, int first, int last, float* image_x) const {
  blocks_.run(first, last, at.buffers.vectors, image_x, image_sequences(at), at.buffers.block,
              at.ops);
}

void Transformer::join(const Evaluation& at, const float* image_x, float* x) const {
  const std::size_t dim = config_.dim, image_size = image_tokens(at.shape) * dim;
  const float* context = at.buffers.contexts;
  const float* const joined = x;
  for (int i = 0; i < at.samples; ++i) {
    const std::size_t context_size = at.shape.context_tokens[i] * dim;
    if (image_x != joined)
      copy(x, image_x + i * image_size, image_size * sizeof(float), at.ops.stream);
    copy(x + image_size, context, context_size * sizeof(float), at.ops.stream);
    x += image_size + context_size;
    context += context_size;
  }
}

void Transformer::run_layers(const Evaluation& at, int first, int last) const {
  const int refiners = config_.n_refiner_layers;
  blocks_.run(refiners + first, refiners + last, at.buffers.vectors, at.buffers.x, sequences(at),
              at.buffers.block, at.ops, {.blocks = streamed_, .first = first});
}

void Transformer::predict(const Evaluation& at) const {
  // Only the rows of the images are projected back to patches.
  const PatchGrid patches = grid(at.shape);
  const Buffers& buffers = at.buffers;
  const int dim = config_.dim;
  std::size_t row = 0;
  for (int i = 0; i < at.samples; ++i) {
    layer_norm({.x = buffers.x + row * dim,
                .scale = buffers.scales,
                .out = static_cast<std::byte*>(buffers.block.normed) +
                       static_cast<std::size_t>(i) * patches.rows() * dim * size_of(shape_.type),
                .type = shape_.type,
                .rows = patches.rows(),
                .dim = dim,
                .eps = kFinalNormEps},
               at.ops.stream);
    row += static_cast<std::size_t>(image_tokens(at.shape) + at.shape.context_tokens[i]);
  }
  linear({.x = buffers.block.normed,
          .weight = tensors_.last,
          .bias = tensors_.last_bias,
          .out = buffers.predicted,
          .out_type = DType::kFloat32,
          .rows = at.samples * patches.rows()},
         at.ops);
}

}  // namespace zimage_rt
