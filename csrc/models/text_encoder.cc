#include "models/text_encoder.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/rope_table.h"

namespace zimage_rt {
namespace {

// Layers per group of streamed weights: 404 MB of Qwen3-4B, which take 10 ms to copy and 0.2 ms to
// compute.
constexpr int kGroup = 2;

struct Layers {
  std::vector<BlockWeights> weights;
  std::vector<BlockModulation> norms;
};

// Looked up at every run, because every upload changes the addresses.
Layers layers_of(const BlockShape& shape, const Weights& weights, int first, int last) {
  Layers layers;
  for (int i = first; i < last; ++i) {
    const std::string layer = "layers." + std::to_string(i) + ".";
    const auto matrix = [&](const char* name, int in, int out) {
      const Matrix found = weights.matrix(layer + name, in, out);
      if (is_8bit(found.dtype) && !shape.has_8bit)
        throw WeightError(layer + name + " has 8 bits, but the module's config does not say so");
      return found;
    };
    const auto vector = [&](const char* name, int size) {
      return weights.vector(layer + name, size);
    };
    layers.weights.push_back(
        {.qkv = matrix("self_attn.qkv_proj.weight", shape.dim, shape.qkv_width()),
         .q_norm = vector("self_attn.q_norm.weight", shape.head_dim),
         .k_norm = vector("self_attn.k_norm.weight", shape.head_dim),
         .out = matrix("self_attn.o_proj.weight", shape.heads * shape.head_dim, shape.dim),
         .gate_up = matrix("mlp.gate_up_proj.weight", shape.dim, 2 * shape.hidden),
         .down = matrix("mlp.down_proj.weight", shape.hidden, shape.dim)});
    layers.norms.push_back({.pre_attention = vector("input_layernorm.weight", shape.dim),
                            .pre_ffn = vector("post_attention_layernorm.weight", shape.dim)});
  }
  return layers;
}

template <typename T>
void widen(const std::byte* source, float* target, int count) {
  const T* const values = reinterpret_cast<const T*>(source);
  for (int i = 0; i < count; ++i) target[i] = static_cast<float>(values[i]);
}

}  // namespace

void TextEncoder::stream(Weights& weights) {
  weights.stream([](const std::string& name) {
    int layer = -1;
    return std::sscanf(name.c_str(), "layers.%d.", &layer) == 1 && layer >= 0 ? layer / kGroup : -1;
  });
}

TextEncoder::TextEncoder(const TextEncoderConfig& config, Weights& weights)
    : config_(config),
      weights_(weights),
      shape_{.dim = config.hidden_size,
             .heads = config.num_attention_heads,
             .kv_heads = config.num_key_value_heads,
             .head_dim = config.head_dim,
             .hidden = config.intermediate_size,
             .norm_eps = config.rms_norm_eps,
             .qk_norm_eps = config.rms_norm_eps,
             .causal = true,
             .type = weights.storage(),
             .attention_scale = config.attention_scale,
             .gate_scale = config.gate_scale,
             .up_scale = config.up_scale,
             .has_8bit = config.quantization.is_on} {
  layers_of(shape_, weights_, 0, config.num_hidden_layers - 1);
  weights_.get("embed_tokens.weight", {config.vocab_size, config.hidden_size}, shape_.type);
  weights_.vector("rope.inv_freq", config.head_dim / 2);
}

TextEncoder::Buffers TextEncoder::plan(int tokens, Arena& arena) const {
  const auto rows = static_cast<std::size_t>(padded(tokens));
  return {.x = arena.take<float>(rows * shape_.dim),
          .cos = arena.take<float>(rows * shape_.head_dim / 2),
          .sin = arena.take<float>(rows * shape_.head_dim / 2),
          .block = BlockBuffers(shape_, rows, arena)};
}

void TextEncoder::read_rows(const std::int64_t* input_ids, int tokens) {
  const int dim = shape_.dim, rows = padded(tokens);
  const std::size_t bytes = sizeof(float) * rows * dim;
  if (rows_.bytes() < bytes) rows_ = PinnedBuffer(bytes);
  const TensorView table =
      weights_.get("embed_tokens.weight", {config_.vocab_size, dim}, shape_.type);
  float* const out = reinterpret_cast<float*>(rows_.data());
  for (int i = 0; i < tokens; ++i) {
    if (input_ids[i] < 0 || input_ids[i] >= config_.vocab_size)
      throw std::invalid_argument("input_ids: expected 0 to " +
                                  std::to_string(config_.vocab_size - 1) + ", got " +
                                  std::to_string(input_ids[i]));
    const std::byte* const row =
        static_cast<const std::byte*>(table.data) +
        static_cast<std::size_t>(input_ids[i]) * dim * size_of(shape_.type);
    if (shape_.type == DType::kFloat16)
      widen<__half>(row, out + static_cast<std::size_t>(i) * dim, dim);
    else
      widen<__nv_bfloat16>(row, out + static_cast<std::size_t>(i) * dim, dim);
  }
  std::memset(out + static_cast<std::size_t>(tokens) * dim, 0,
              sizeof(float) * (rows - tokens) * dim);
}

void TextEncoder::load_prompt(const std::int64_t* input_ids, int tokens, const Buffers& buffers,
                              const Ops& ops) {
  // The copy of the previous prompt's rows from the page-locked buffer must be complete.
  ZRT_CUDA(cudaStreamSynchronize(ops.stream));
  read_rows(input_ids, tokens);
  ZRT_CUDA(cudaMemcpyAsync(buffers.x, rows_.data(), sizeof(float) * padded(tokens) * shape_.dim,
                           cudaMemcpyHostToDevice, ops.stream));
}

void TextEncoder::run_layers(int tokens, const Buffers& buffers, const Ops& ops) {
  const int rows = padded(tokens);
  const int half = shape_.head_dim / 2;
  position_table(weights_.vector("rope.inv_freq", half), half, rows, buffers.cos, buffers.sin,
                 ops.stream);
  const int count = config_.num_hidden_layers - 1;
  const int together = weights_.streams() ? kGroup : count;
  const Sequences sequence{.rows = rows,
                           .groups = {{.first_row = 0, .sequences = 1, .tokens = rows}},
                           .rope = {buffers.cos, buffers.sin}};
  for (int first = 0; first < count; first += together) {
    if (weights_.streams()) weights_.load_group(first / kGroup, ops.stream);
    const Layers layers = layers_of(shape_, weights_, first, std::min(first + together, count));
    run_blocks(shape_, layers.weights, layers.norms, buffers.x, sequence, buffers.block, ops);
  }
}

}  // namespace zimage_rt
