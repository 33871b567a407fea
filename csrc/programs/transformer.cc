#include "programs/transformer.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "kernels/norm.h"
#include "zimage_rt/check.h"

namespace zimage_rt {
namespace {

// Fixed in the architecture, not in the config (export/modeling/transformer.py).
constexpr int kAdaLnWidth = 256;
constexpr int kFrequencies = 128;
constexpr int kTimestepMiddle = 1024;
constexpr float kQkNormEps = 1e-5f;
constexpr float kFinalNormEps = 1e-6f;

void copy(void* target, const void* source, std::size_t bytes, cudaStream_t stream) {
  ZRT_CUDA(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream));
}

}  // namespace

BlockShape TransformerConfig::block_shape(DType type) const {
  return {dim,        n_heads, n_heads, dim / n_heads,   hidden_dim, norm_eps,
          kQkNormEps, false,   type,    attention_scale, gate_scale, up_scale};
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
    axes.push_back({table("cos"), table("sin"), length, size});
  }
  return axes;
}

BlockWeights block_weights(const TransformerConfig& config, const BlockShape& shape,
                           const Weights& weights, const std::string& layer) {
  const auto matrix = [&](const char* name, std::int64_t in, std::int64_t out) {
    return weights.get(layer + name, {in, out}, shape.type).data;
  };
  const auto norm = [&](const char* name) {
    return config.qk_norm ? weights.get(layer + name, {shape.head_dim}, DType::kFloat32).f32()
                          : nullptr;
  };
  return {matrix("attention.qkv.weight", shape.dim, shape.qkv_width()),
          norm("attention.norm_q.weight"),
          norm("attention.norm_k.weight"),
          matrix("attention.to_out.0.weight", shape.dim, shape.dim),
          matrix("feed_forward.w13.weight", shape.dim, 2 * shape.hidden),
          matrix("feed_forward.w2.weight", shape.hidden, shape.dim)};
}

Transformer::Transformer(const TransformerConfig& config, const Weights& weights)
    : config_(config),
      weights_(weights),
      shape_(config.block_shape(weights.storage())),
      axes_(rope_axes(config, weights, 3)),
      width_(std::min(config.dim, kAdaLnWidth)),
      patch_name_(std::to_string(config.patch_size) + "-1") {
  std::vector<ModulatedBlock> modulated;
  const auto add = [&](const std::string& layer) {
    blocks_.push_back(block_weights(config, shape_, weights, layer));
    const auto norm = [&](const char* name) {
      return weights.get(layer + name + ".weight", {config.dim}, DType::kFloat32).f32();
    };
    modulated.push_back(
        {weights.get(layer + "adaLN_modulation.0.weight", {width_, 4 * config.dim}, shape_.type)
             .data,
         weights.get(layer + "adaLN_modulation.0.bias", {4 * config.dim}, DType::kFloat32).f32(),
         {norm("attention_norm1"), norm("attention_norm2"), norm("ffn_norm1"), norm("ffn_norm2")}});
  };
  for (int i = 0; i < config.n_refiner_layers; ++i) add("noise_refiner." + std::to_string(i) + ".");
  for (int i = 0; i < config.n_layers; ++i) add("layers." + std::to_string(i) + ".");
  const std::size_t bytes = modulated.size() * sizeof(ModulatedBlock);
  modulated_ = DeviceBuffer(bytes, "the transformer's modulation table");
  ZRT_CUDA(cudaMemcpy(modulated_.data(), modulated.data(), bytes, cudaMemcpyHostToDevice));
}

PatchGrid Transformer::grid(const SampleShape& shape) const {
  return {config_.in_channels, shape.latent_height, shape.latent_width, config_.patch_size};
}

int Transformer::rows(const SampleShape& shape, int samples) const {
  const int context =
      std::accumulate(shape.context_rows.begin(), shape.context_rows.begin() + samples, 0);
  return samples * padded_rows(grid(shape).rows()) + context;
}

Transformer::Buffers Transformer::plan(const SampleShape& shape, Arena& arena) const {
  const auto samples = static_cast<int>(shape.context_rows.size());
  const auto all = static_cast<std::size_t>(rows(shape, samples));
  const auto steps = static_cast<std::size_t>(shape.steps),
             dim = static_cast<std::size_t>(config_.dim);
  const PatchGrid patches = grid(shape);
  const std::size_t image = static_cast<std::size_t>(samples) * padded_rows(patches.rows());
  const std::size_t half = shape_.head_dim / 2;
  float* const timesteps = arena.take<float>(steps);
  float* const contexts = arena.take<float>((all - image) * dim);
  float* const embedding = arena.take<float>(steps * width_);
  float* const vectors = arena.take<float>(steps * blocks_.size() * 4 * dim);
  float* const scales = arena.take<float>(steps * dim);
  float* const cos = arena.take<float>(all * half);
  float* const sin = arena.take<float>(all * half);
  float* const x = arena.take<float>(all * dim);
  const bool single = samples == 1;
  return {timesteps,
          contexts,
          embedding,
          vectors,
          scales,
          cos,
          sin,
          single ? cos : arena.take<float>(image * half),
          single ? sin : arena.take<float>(image * half),
          x,
          single ? x : arena.take<float>(image * dim),
          arena.take(image * patches.features() * size_of(shape_.type)),
          arena.take<float>(static_cast<std::size_t>(samples) * patches.values()),
          BlockBuffers(shape_, all, arena)};
}

void Transformer::prepare(const SampleShape& shape, const Buffers& buffers, const Ops& ops) const {
  const auto vector = [&](const std::string& name, std::int64_t size) {
    return weights_.get(name, {size}, DType::kFloat32).f32();
  };
  const auto matrix = [&](const std::string& name, std::int64_t in, std::int64_t out) {
    return weights_.get(name, {in, out}, shape_.type).data;
  };
  timestep_embedding(
      {buffers.timesteps, config_.t_scale, vector("t_embedder.constants.frequencies", kFrequencies),
       kFrequencies, matrix("t_embedder.mlp.0.weight", 2 * kFrequencies, kTimestepMiddle),
       vector("t_embedder.mlp.0.bias", kTimestepMiddle), kTimestepMiddle,
       matrix("t_embedder.mlp.2.weight", kTimestepMiddle, width_),
       vector("t_embedder.mlp.2.bias", width_), width_, shape_.type, buffers.embedding,
       shape.steps},
      ops.stream);
  modulation({buffers.embedding, reinterpret_cast<const ModulatedBlock*>(modulated_.data()),
              static_cast<int>(blocks_.size()), width_, config_.dim, shape_.type, buffers.vectors,
              shape.steps},
             ops.stream);
  const std::string last = "all_final_layer." + patch_name_ + ".adaLN_modulation.1.";
  final_modulation({buffers.embedding, matrix(last + "weight", width_, config_.dim),
                    vector(last + "bias", config_.dim), width_, config_.dim, shape_.type,
                    buffers.scales, shape.steps},
                   ops.stream);

  const PatchGrid patches = grid(shape);
  const int image_rows = padded_rows(patches.rows()), half = shape_.head_dim / 2;
  std::size_t row = 0;
  for (std::size_t i = 0; i < shape.context_rows.size(); ++i) {
    RopeTable table{{axes_[0], axes_[1], axes_[2]}, patches.height / patches.patch,
                    patches.width / patches.patch,  image_rows,
                    shape.context_rows[i],          buffers.cos + row * half,
                    buffers.sin + row * half};
    rope_table(table, ops.stream);
    if (buffers.image_cos != buffers.cos) {
      const std::size_t size = static_cast<std::size_t>(image_rows) * half;
      copy(buffers.image_cos + i * size, table.cos, size * sizeof(float), ops.stream);
      copy(buffers.image_sin + i * size, table.sin, size * sizeof(float), ops.stream);
    }
    row += static_cast<std::size_t>(image_rows + shape.context_rows[i]);
  }
}

void Transformer::evaluate(const SampleShape& shape, int samples, int step, const float* latents,
                           const Buffers& buffers, const Ops& ops) const {
  const PatchGrid patches = grid(shape);
  const int dim = config_.dim, image_rows = padded_rows(patches.rows());
  std::vector<BlockVectors> vectors;
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const float* const v =
        buffers.vectors + (static_cast<std::size_t>(step) * blocks_.size() + i) * 4 * dim;
    vectors.push_back({v, v + dim, v + 2 * dim, v + 3 * dim});
  }
  const auto part = [&](const auto& list, std::size_t first, std::size_t last) {
    return std::decay_t<decltype(list)>(list.begin() + first, list.begin() + last);
  };
  const auto refiners = static_cast<std::size_t>(config_.n_refiner_layers);

  patchify(latents, shape.latent_samples, patches, buffers.patches, shape_.type, samples,
           image_rows, ops.stream);
  const std::string embedder = "all_x_embedder." + patch_name_ + ".";
  GemmArgs embed{};
  embed.a = buffers.patches;
  embed.weight = weights_.get(embedder + "weight", {patches.features(), dim}, shape_.type).data;
  embed.bias = weights_.get(embedder + "bias", {dim}, DType::kFloat32).f32();
  embed.out = buffers.image_x;
  embed.type = shape_.type;
  embed.out_type = DType::kFloat32;
  embed.m = samples * image_rows, embed.n = dim, embed.k = patches.features();
  ops.gemm.run(embed, ops.stream);
  fill_rows(buffers.image_x, weights_.get("x_pad_token", {1, dim}, DType::kFloat32).f32(), samples,
            image_rows, patches.rows(), image_rows - patches.rows(), dim, ops.stream);
  run_blocks(shape_, part(blocks_, 0, refiners), part(vectors, 0, refiners), buffers.image_x,
             samples * image_rows, {{0, samples, image_rows}},
             {buffers.image_cos, buffers.image_sin}, buffers.block, ops);

  // Each sample's image rows, then its context; neighbours of one length attend together.
  std::vector<SequenceGroup> groups;
  std::vector<int> first_rows;
  int row = 0, context_row = 0;
  for (int i = 0; i < samples; ++i) {
    const int context_rows = shape.context_rows[i], tokens = image_rows + context_rows;
    float* const x = buffers.x + static_cast<std::size_t>(row) * dim;
    const std::size_t image_size = static_cast<std::size_t>(image_rows) * dim;
    if (buffers.image_x != buffers.x)
      copy(x, buffers.image_x + i * image_size, image_size * sizeof(float), ops.stream);
    copy(x + image_size, buffers.contexts + static_cast<std::size_t>(context_row) * dim,
         sizeof(float) * context_rows * dim, ops.stream);
    if (!groups.empty() && groups.back().tokens == tokens)
      ++groups.back().sequences;
    else
      groups.push_back({row, 1, tokens});
    first_rows.push_back(row);
    row += tokens;
    context_row += context_rows;
  }
  run_blocks(shape_, part(blocks_, refiners, blocks_.size()),
             part(vectors, refiners, blocks_.size()), buffers.x, row, groups,
             {buffers.cos, buffers.sin}, buffers.block, ops);

  // Only the images' rows are projected back to patches.
  const std::string last = "all_final_layer." + patch_name_ + ".linear.";
  GemmArgs project = embed;
  for (int i = 0; i < samples; ++i)
    layer_norm({buffers.x + static_cast<std::size_t>(first_rows[i]) * dim,
                buffers.scales + static_cast<std::size_t>(step) * dim,
                static_cast<std::byte*>(buffers.block.normed) +
                    static_cast<std::size_t>(i) * patches.rows() * dim * size_of(shape_.type),
                shape_.type, patches.rows(), dim, kFinalNormEps},
               ops.stream);
  project.a = buffers.block.normed;
  project.weight = weights_.get(last + "weight", {dim, patches.features()}, shape_.type).data;
  project.bias = weights_.get(last + "bias", {patches.features()}, DType::kFloat32).f32();
  project.out = buffers.predicted;
  project.m = samples * patches.rows(), project.n = patches.features(), project.k = dim;
  ops.gemm.run(project, ops.stream);
}

}  // namespace zimage_rt
