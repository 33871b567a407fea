#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/check.h"
#include "device/matrix.h"
#include "models/transformer.h"
#include "ops/linear.h"

namespace zimage_rt {
namespace {

constexpr char kModulation[] = "adaLN_modulation.0.weight";

// The input of a block's modulation.
int modulation_width(const Weights& weights, const std::string& layer) {
  const int width = weights.axis(layer + kModulation, 2, 0);
  if (width > kMaxModulationWidth)
    throw std::invalid_argument("transformer: expected a modulation of at most " +
                                std::to_string(kMaxModulationWidth) + " inputs, got " +
                                std::to_string(width));
  return width;
}

}  // namespace

ModulatedBlocks::ModulatedBlocks(const TransformerConfig& config, const Weights& weights,
                                 const std::vector<std::string>& layers, const char* purpose)
    : shape_(config.block_shape(weights.storage())),
      width_(modulation_width(weights, layers.at(0))) {
  std::vector<ModulatedBlock> modulated;
  find_matrices(config, weights, layers);
  for (const std::string& layer : layers) {
    const auto norm = [&](const char* name) {
      return weights.vector(layer + name + ".weight", config.dim);
    };
    const Matrix adaln = weights.matrix(layer + kModulation, width_, 4 * config.dim);
    modulated.push_back({.weight = in_out_data(adaln),
                         .bias = weights.vector(layer + "adaLN_modulation.0.bias", 4 * config.dim),
                         .norms = {norm("attention_norm1"), norm("attention_norm2"),
                                   norm("ffn_norm1"), norm("ffn_norm2")}});
  }
  const std::size_t bytes = modulated.size() * sizeof(ModulatedBlock);
  modulated_ = DeviceBuffer(bytes, purpose);
  ZRT_CUDA(cudaMemcpy(modulated_.data(), modulated.data(), bytes, cudaMemcpyHostToDevice));
}

void ModulatedBlocks::find_matrices(const TransformerConfig& config, const Weights& weights,
                                    const std::vector<std::string>& layers) {
  blocks_.clear();
  for (const std::string& layer : layers)
    blocks_.push_back(block_weights(config, shape_, weights, layer));
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
                          const Sequences& sequences, const BlockBuffers& buffers, const Ops& ops,
                          const BlockStream& streamed) const {
  std::vector<BlockModulation> modulations;
  for (int i = first; i < last; ++i) {
    const float* const v = vectors + static_cast<std::size_t>(i) * 4 * shape_.dim;
    modulations.push_back({.pre_attention = v,
                           .post_attention = v + shape_.dim,
                           .pre_ffn = v + 2 * shape_.dim,
                           .post_ffn = v + 3 * shape_.dim});
  }
  run_blocks(shape_, {blocks_.begin() + first, blocks_.begin() + last}, modulations, x, sequences,
             buffers, ops, streamed);
}

}  // namespace zimage_rt
