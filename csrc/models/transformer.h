#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/modulation.h"
#include "kernels/patchify.h"
#include "kernels/rope_table.h"
#include "models/block.h"
#include "models/reference.h"
#include "weights/streamed_blocks.h"
#include "weights/weights.h"

namespace zimage_rt {

// The config of Z-Image's transformer in the manifest (export/modeling/transformer.py).
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
  Quantization quantization = {};

  BlockShape block_shape(DType type) const;
};

// The checkpoint's RoPE tables of the first `count` axes.
std::vector<RopeAxis> rope_axes(const TransformerConfig& config, const Weights& weights, int count);

// The matrices of `layer` (e.g. "layers.3."), checked.
BlockWeights block_weights(const TransformerConfig& config, const BlockShape& shape,
                           const Weights& weights, const std::string& layer);

// Has the matrices of all blocks stored as [out, in]. Call it before the weights are uploaded.
void transpose_block_matrices(Weights& weights);

// Has the matrices of the transformer's layers stored so that layers can be streamed. The noise
// refiner stays resident: a ControlNet runs it twice, and it is computed during the first copies.
void split_layers(const TransformerConfig& config, Weights& weights);

// prompt_embeds [tokens, cap_feat_dim] → context [padded_tokens(tokens), dim], once per prompt.
class ContextRefiner {
 public:
  // Looks up all weights, whose addresses must not change. Throws WeightError.
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
    Matrix embed;       // [cap_feat_dim, dim]
    const float* embed_bias;
    const float* pad;  // [dim]: the pad row of a prompt
    RopeAxis positions;
  };
  static Tensors tensors_of(const TransformerConfig& config, const Weights& weights);

  TransformerConfig config_;
  BlockShape shape_;
  std::vector<BlockWeights> blocks_;
  std::vector<BlockModulation> norms_;
  Tensors tensors_;
};

// The samples of an evaluation. With guidance the negative samples follow the positive ones and
// read the same latents.
struct SampleShape {
  int latent_samples;
  int latent_height;
  int latent_width;
  std::vector<int> context_tokens;  // one per sample, multiples of kSequenceMultiple
};

// Blocks whose norms the timestep modulates.
class ModulatedBlocks {
 public:
  // `layers`: names, e.g. "layers.3."; `purpose` is for errors. Checks the weights. Throws
  // WeightError.
  ModulatedBlocks(const TransformerConfig& config, const Weights& weights,
                  const std::vector<std::string>& layers, const char* purpose);
  // Looks up the addresses of the blocks' matrices again.
  void find_matrices(const TransformerConfig& config, const Weights& weights,
                     const std::vector<std::string>& layers);

  // The number of floats in the vectors of one step, [blocks, 4, dim].
  std::size_t step_vectors() const { return blocks_.size() * 4 * shape_.dim; }
  // The width of the timestep's embedding, from the shapes of the weights.
  int width() const { return width_; }
  // vectors [steps, blocks, 4, dim], from the embedding of the timesteps.
  void prepare(const float* embedding, int steps, float* vectors, cudaStream_t stream) const;
  // Runs x through blocks [first, last), in place, with the vectors of one step.
  void run(int first, int last, const float* vectors, float* x, const Sequences& sequences,
           const BlockBuffers& buffers, const Ops& ops, const BlockStream& streamed = {}) const;

 private:
  BlockShape shape_;
  int width_;
  std::vector<BlockWeights> blocks_;
  DeviceBuffer modulated_;  // a ModulatedBlock per block
};

class Transformer {
 public:
  // Looks up all weights, whose addresses only stream_layers() changes. Throws WeightError.
  Transformer(const TransformerConfig& config, const Weights& weights);
  // Streams so many layers: see StreamedBlocks::move. Graphs that were captured before are invalid.
  void stream_layers(int count, const Weights& weights, cudaStream_t stream);

  // Everything that depends on the timestep alone, for all steps of a loop.
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
    float* contexts;  // of all samples, concatenated: [sum of context_tokens, dim]
    float* vectors;   // of the current step, [blocks, 4, dim]
    float* scales;    // of the current step, [dim]
    float* cos;       // [rows, head_dim / 2]
    float* sin;
    float* image_cos;  // the same for the rows of the images only
    float* image_sin;
    float* x;          // [rows, dim]: per sample the image rows, then the context rows
    float* image_x;    // [samples * image_tokens, dim]; the start of x for a single sample
    void* patches;     // the input of the embedder
    float* predicted;  // [samples, grid.rows(), grid.features()]
    BlockBuffers block;
  };
  Buffers plan(const SampleShape& shape, Arena& arena) const;

  // Computes the positions of all rows, which depend on neither the latents nor the step.
  void prepare(const SampleShape& shape, const Buffers& buffers, const Ops& ops) const;
  std::size_t step_vectors() const { return blocks_.step_vectors(); }

  // One function evaluation of the first `samples` samples. No kernel argument depends on the step,
  // so that a captured evaluation serves all steps.
  struct Evaluation {
    const SampleShape& shape;
    int samples;
    const Buffers& buffers;
    const Ops& ops;
  };
  // latents [latent_samples, in_channels, h, w] → buffers.predicted.
  void evaluate(const Evaluation& at, const float* latents) const;

  // The stages of `evaluate` in order, for a ControlNet, which works between them.

  // Begins the copies of streamed layers.
  void begin(const Evaluation& at) const;
  // The linear layer from patches of latents to rows: the transformer's, or a ControlNet's.
  struct Embedder {
    int channels;
    Matrix weight;  // [patch * patch * channels, dim]
    const float* bias;
  };
  const Embedder& embedder() const { return tensors_.embedder; }
  // latents [latent_samples, channels, h, w] → image_x; `patches` is scratch.
  void embed(const Evaluation& at, const Embedder& embedder, const float* latents, void* patches,
             float* image_x) const;
  // Blocks [first, last) of the noise refiner.
  void refine(const Evaluation& at, int first, int last, float* image_x) const;
  // image_x and buffers.contexts → x, sample by sample.
  void join(const Evaluation& at, const float* image_x, float* x) const;
  // Layers [first, last) on buffers.x.
  void run_layers(const Evaluation& at, int first, int last) const;
  // buffers.x → buffers.predicted.
  void predict(const Evaluation& at) const;

  PatchGrid grid(const SampleShape& shape) const;
  int dim() const { return config_.dim; }
  const TransformerConfig& config() const { return config_; }
  DType type() const { return shape_.type; }
  int width() const { return blocks_.width(); }  // of the timestep's embedding
  // Rows of one image with padding, and of the first `samples` samples with their contexts.
  int image_tokens(const SampleShape& shape) const { return padded_tokens(grid(shape).rows()); }
  int rows(const SampleShape& shape, int samples) const;
  // The rows of the images only, and all rows.
  Sequences image_sequences(const Evaluation& at) const;
  Sequences sequences(const Evaluation& at) const;

 private:
  // The tensors outside of the blocks.
  struct Tensors {
    // The timestep's embedding: frequencies [half], a middle layer, an output of the blocks' width.
    const float* frequencies;
    int half;
    int middle;
    Matrix timestep1;
    const float* timestep1_bias;
    Matrix timestep2;
    const float* timestep2_bias;
    Embedder embedder;
    const float* pad;  // [dim]: the pad row of an image
    Matrix last_modulation;
    const float* last_modulation_bias;
    Matrix last;  // [dim, features]
    const float* last_bias;
  };
  static Tensors tensors_of(const TransformerConfig& config, const Weights& weights, int width);

  TransformerConfig config_;
  BlockShape shape_;
  ModulatedBlocks blocks_;  // noise_refiner, then layers
  std::vector<RopeAxis> axes_;
  Tensors tensors_;
  StreamedBlocks* streamed_;  // the layers' matrices; null: all are resident
};

}  // namespace zimage_rt
