#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/device.h"
#include "kernels/modulation.h"
#include "kernels/patchify.h"
#include "kernels/rope_table.h"
#include "models/block.h"
#include "weights/weights.h"

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
  int adaln_width() const;  // of the timestep's embedding
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

// Has the device hold every such matrix turned. Before the weights are uploaded.
void turn_block_matrices(Weights& weights);

// prompt_embeds [tokens, cap_feat_dim] → context [padded_rows(tokens), dim], once a prompt.
class ContextRefiner {
 public:
  // Looks up all weights, which must stay where they are. Throws WeightError.
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
  // The tensors outside of the blocks.
  struct Tensors {
    const float* norm;  // [cap_feat_dim]
    const void* embed;  // [cap_feat_dim, dim]
    const float* embed_bias;
    const float* pad;  // [dim]: what a prompt's rows are padded with
    RopeAxis positions;
  };
  static Tensors tensors_of(const TransformerConfig& config, const BlockShape& shape,
                            const Weights& weights);

  TransformerConfig config_;
  BlockShape shape_;
  std::vector<BlockWeights> blocks_;
  std::vector<BlockVectors> vectors_;
  Tensors tensors_;
};

// The samples of an evaluation. With guidance the negative samples follow the positive ones, and
// read the same latents.
struct SampleShape {
  int latent_samples;
  int latent_height;
  int latent_width;
  std::vector<int> context_rows;  // one per sample, multiples of 32
};

// Rows that pass through blocks together: what attends to what, and where each row stands.
struct Sequences {
  int rows;
  std::vector<SequenceGroup> groups;
  RopeView rope;
};

// Blocks whose norms the timestep modulates.
class ModulatedBlocks {
 public:
  // `layers`: their names, e.g. "layers.3."; `purpose`: for errors. Checks the weights. Throws
  // WeightError.
  ModulatedBlocks(const TransformerConfig& config, const Weights& weights,
                  const std::vector<std::string>& layers, const char* purpose);

  // Floats of one step's vectors, [blocks, 4, dim].
  std::size_t step_vectors() const { return blocks_.size() * 4 * shape_.dim; }
  // vectors [steps, blocks, 4, dim], from the timesteps' embedding.
  void prepare(const float* embedding, int steps, float* vectors, cudaStream_t stream) const;
  // Runs x through the blocks from `first` to before `last`, in place, with one step's vectors.
  void run(int first, int last, const float* vectors, float* x, const Sequences& sequences,
           const BlockBuffers& buffers, const Ops& ops) const;

 private:
  BlockShape shape_;
  int width_;
  std::vector<BlockWeights> blocks_;
  DeviceBuffer modulated_;  // ModulatedBlock of every block
};

class Transformer {
 public:
  // Looks up all weights, which must stay where they are. Throws WeightError.
  Transformer(const TransformerConfig& config, const Weights& weights);

  // What the timestep decides, for all steps of a loop.
  struct StepTable {
    float* timesteps;  // [steps], = 1 - sigma
    float* embedding;  // [steps, adaLN width]
    float* vectors;    // [steps, blocks, 4, dim]
    float* scales;     // [steps, dim]
  };
  StepTable plan_steps(int steps, Arena& arena) const;
  // Fills a table from its timesteps.
  void prepare_steps(const StepTable& table, int steps, const Ops& ops) const;

  struct Buffers {
    float* contexts;  // the samples' rows one after the other, [sum, dim]
    float* vectors;   // of the step that runs, [blocks, 4, dim]
    float* scales;    // of the step that runs, [dim]
    float* cos;       // [rows, head_dim / 2]
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

  // What depends on neither the latents nor the step: where each row stands.
  void prepare(const SampleShape& shape, const Buffers& buffers, const Ops& ops) const;
  std::size_t step_vectors() const { return blocks_.step_vectors(); }

  // One function evaluation, for the first `samples` samples. No kernel's argument depends on the
  // step, so that a captured evaluation serves all steps.
  struct Evaluation {
    const SampleShape& shape;
    int samples;
    const Buffers& buffers;
    const Ops& ops;
  };
  // Into buffers.predicted.
  void evaluate(const Evaluation& at, const float* latents) const;

  // The stages of `evaluate`, in their order: a ControlNet does its own work between them.

  // Latents of some channels become rows; both Z-Image's own and a ControlNet's.
  struct Embedder {
    int channels;
    const void* weight;  // [patch * patch * channels, dim]
    const float* bias;
  };
  const Embedder& embedder() const { return tensors_.embedder; }
  // latents [latent_samples, channels, h, w] → image_x, by way of `patches`.
  void embed(const Evaluation& at, const Embedder& embedder, const float* latents, void* patches,
             float* image_x) const;
  // The noise refiner's blocks from `first` to before `last`.
  void refine(const Evaluation& at, int first, int last, float* image_x) const;
  // image_x and buffers.contexts → x, laid out as their buffers are.
  void join(const Evaluation& at, const float* image_x, float* x) const;
  // The layers from `first` to before `last`, on buffers.x.
  void run_layers(const Evaluation& at, int first, int last) const;
  // buffers.x → buffers.predicted.
  void predict(const Evaluation& at) const;

  PatchGrid grid(const SampleShape& shape) const;
  int dim() const { return config_.dim; }
  const TransformerConfig& config() const { return config_; }
  DType type() const { return shape_.type; }
  // Rows of one image, and of the first `samples` samples with their contexts.
  int image_rows(const SampleShape& shape) const { return padded_rows(grid(shape).rows()); }
  int rows(const SampleShape& shape, int samples) const;
  // The images' rows alone, and all of them.
  Sequences image_sequences(const Evaluation& at) const;
  Sequences sequences(const Evaluation& at) const;

 private:
  // The tensors outside of the blocks.
  struct Tensors {
    const float* frequencies;  // of the timestep's embedding
    const void* timestep1;
    const float* timestep1_bias;
    const void* timestep2;
    const float* timestep2_bias;
    Embedder embedder;
    const float* pad;  // [dim]: what an image's rows are padded with
    const void* last_modulation;
    const float* last_modulation_bias;
    const void* last;  // [dim, features]
    const float* last_bias;
  };
  static Tensors tensors_of(const TransformerConfig& config, const BlockShape& shape,
                            const Weights& weights);

  TransformerConfig config_;
  BlockShape shape_;
  ModulatedBlocks blocks_;  // noise_refiner, then layers
  std::vector<RopeAxis> axes_;
  Tensors tensors_;
  int width_;  // of the timestep's embedding
};

}  // namespace zimage_rt
