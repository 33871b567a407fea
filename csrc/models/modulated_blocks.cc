#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "device/check.h"
#include "device/matrix.h"
#include "models/transformer.h"
#include "ops/linear.h"

namespace zimage_rt {
namespace {

// Fixed in the architecture, not in the config (export/modeling/transformer.py).
constexpr int kAdaLnWidth = 256;

}  // namespace

int TransformerConfig::adaln_width() const { return std::min(dim, kAdaLnWidth); }

ModulatedBlocks::ModulatedBlocks(const TransformerConfig& config, const Weights& weights,
                                 const std::vector<std::string>& layers, const char* purpose)
    : shape_(config.block_shape(weights.storage())), width_(config.adaln_width()) {
  std::vector<ModulatedBlock> modulated;
  for (const std::string& layer : layers) {
    blocks_.push_back(block_weights(config, shape_, weights, layer));
    const auto norm = [&](const char* name) {
      return weights.vector(layer + name + ".weight", config.dim);
    };
    const Matrix adaln =
        weights.matrix(layer + "adaLN_modulation.0.weight", width_, 4 * config.dim);
    modulated.push_back({.weight = in_out_data(adaln),
                         .bias = weights.vector(layer + "adaLN_modulation.0.bias", 4 * config.dim),
                         .norms = {norm("attention_norm1"), norm("attention_norm2"),
                                   norm("ffn_norm1"), norm("ffn_norm2")}});
  }
  const std::size_t bytes = modulated.size() * sizeof(ModulatedBlock);
  modulated_ = DeviceBuffer(bytes, purpose);
  ZRT_CUDA(cudaMemcpy(modulated_.data(), modulated.data(), bytes, cudaMemcpyHostToDevice));
}

void ModulatedBlocks::prepare(const float* embedding, int steps, float* vectors,
                              cudaStream_t stream) const {
  modulation({.embedding = embedding,
              .blocks = reinterpret_cast<const ModulatedBlock*>(modulated_.data()),
              .block_count = static_cast<int>(blocks_.size()),
              .width = width_,
              .dim = shape_.dim,
              .type = shape_.type,
              .vectors = vectors,
              .steps = steps},
             stream);
}

void ModulatedBlocks::run(int first, int last, const float* vectors, float* x,
                          const Sequences& sequences, const BlockBuffers& buffers,
                          const Ops& ops) const {
  std::vector<BlockModulation> modulations;
  for (int i = first; i < last; ++i) {
    const float* const v = vectors + static_cast<std::size_t>(i) * 4 * shape_.dim;
    modulations.push_back({.pre_attention = v,
                           .post_attention = v + shape_.dim,
                           .pre_ffn = v + 2 * shape_.dim,
                           .post_ffn = v + 3 * shape_.dim});
  }
  run_blocks(shape_, {blocks_.begin() + first, blocks_.begin() + last}, modulations, x, sequences,
             buffers, ops);
}

}  // namespace zimage_rt
