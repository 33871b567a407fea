#pragma once

#include <string>
#include <vector>

#include "kernels/modulation.h"
#include "kernels/patches.h"
#include "kernels/rope_table.h"
#include "programs/block.h"
#include "programs/weights.h"
#include "zimage_rt/device.h"

namespace zimage_rt {

// Sizes of Z-Image's transformer as the manifest has them (export/modeling/transformer.py).
struct TransformerConfig {
  int in_channels;
  int dim;
  int n_layers;
  int n_refiner_layers;
  int n_heads;
  int hidden_dim;
  int cap_feat_dim;
  int patch_size;
  float norm_eps;
  bool qk_norm;
  float t_scale;
  std::vector<int> axes_dims;
  std::vector<int> axes_lens;
  float attention_scale;
  float gate_scale;
  float up_scale;

  BlockShape block_shape(DType type) const;
};

// Rows of every sequence are padded to a multiple of this (SEQ_MULTI_OF in diffusers).
constexpr int kSequenceMultiple = 32;
inline int padded_rows(int rows) {
  return (rows + kSequenceMultiple - 1) / kSequenceMultiple * kSequenceMultiple;
}

// The checkpoint's RoPE tables of the first `count` axes.
std::vector<RopeAxis> rope_axes(const TransformerConfig& config, const Weights& weights, int count);

// The matrices of `layer` (e.g. "layers.3."), checked.
BlockWeights block_weights(const TransformerConfig& config, const BlockShape& shape,
                           const Weights& weights, const std::string& layer);

// prompt_embeds [tokens, cap_feat_dim] → context [padded_rows(tokens), dim], once a prompt.
class ContextRefiner {
 public:
  // Checks the weights. Throws WeightError.
  ContextRefiner(const TransformerConfig& config, const Weights& weights);

  struct Buffers {
    float* context;
    void* normed;  // [tokens, cap_feat_dim]
    float* cos;
    float* sin;
    BlockBuffers block;
  };
  Buffers plan(int tokens, Arena& arena) const;
  void run(const float* prompt_embeds, int tokens, const Buffers& buffers, const Ops& ops) const;
  int dim() const { return config_.dim; }
  int embed_dim() const { return config_.cap_feat_dim; }

 private:
  TransformerConfig config_;
  const Weights& weights_;
  BlockShape shape_;
  std::vector<BlockWeights> blocks_;
  std::vector<BlockVectors> vectors_;
};

// What a loop of evaluations looks like. Of a guided one the negative samples lie behind the
// positive ones, and read the same latents.
struct SampleShape {
  int latent_samples;
  int latent_height;
  int latent_width;
  std::vector<int> context_rows;  // one a sample, multiples of 32
  int steps;
};

class Transformer {
 public:
  // Checks the weights. Throws WeightError.
  Transformer(const TransformerConfig& config, const Weights& weights);

  struct Buffers {
    float* timesteps;  // [steps], = 1 - sigma
    float* contexts;   // the samples' rows one after the other, [sum, dim]
    float* embedding;  // [steps, adaLN width]
    float* vectors;    // [steps, blocks, 4, dim]
    float* scales;     // [steps, dim]
    float* cos;        // [rows, head_dim / 2]
    float* sin;
    float* image_cos;  // the same for the images' rows alone
    float* image_sin;
    float* x;          // [rows, dim]: image rows, then context rows, sample after sample
    float* image_x;    // [samples * image rows, dim]; of a single sample, the start of x
    void* patches;     // what the embedder reads
    float* predicted;  // [samples, grid.rows(), grid.features()]
    BlockBuffers block;
  };
  Buffers plan(const SampleShape& shape, Arena& arena) const;

  // Everything that does not depend on the latents: from buffers.timesteps, for all steps.
  void prepare(const SampleShape& shape, const Buffers& buffers, const Ops& ops) const;
  // One function evaluation for the first `samples` samples, into buffers.predicted.
  void evaluate(const SampleShape& shape, int samples, int step, const float* latents,
                const Buffers& buffers, const Ops& ops) const;

  PatchGrid grid(const SampleShape& shape) const;
  int dim() const { return config_.dim; }

 private:
  int rows(const SampleShape& shape, int samples) const;

  TransformerConfig config_;
  const Weights& weights_;
  BlockShape shape_;
  std::vector<BlockWeights> blocks_;  // noise_refiner, then layers
  std::vector<RopeAxis> axes_;
  int width_;               // of the timestep's embedding
  DeviceBuffer modulated_;  // ModulatedBlock of every block
  std::string patch_name_;
};

}  // namespace zimage_rt
