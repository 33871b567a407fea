#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/matrix.h"
#include "models/transformer.h"

namespace zimage_rt {

// The config of a ControlNet in the manifest (export/modeling/controlnet.py).
struct ControlNetConfig {
  TransformerConfig transformer;  // of the controlled transformer
  int control_in_dim;
  std::vector<int> control_layers_places;
  std::vector<int> control_refiner_layers_places;
  int control_refiner_layers;
  // The refiner of the control image: "" plain blocks (Fun-Union 1), "control_layers" the control
  // layers, over the image only (2.0), "control_noise_refiner" control blocks of their own (2.1).
  std::string add_control_noise_refiner;
};

// A second residual stream c, which begins as the control image. Projections of c, the hints, are
// added to the stream x of a transformer. A hint is added as soon as it is computed, so that one
// buffer is enough.
class ControlNet {
 public:
  // Looks up all weights. Throws WeightError. Keeps references to the transformer and the weights.
  ControlNet(const ControlNetConfig& config, const Weights& weights,
             const Transformer& transformer);

  struct Buffers {
    float* latents;  // of the control images, [latent_samples, control_in_dim, h, w]
    float* scale;    // [1], the factor of the hints
    float* vectors;  // of the current step, [blocks, 4, dim]
    float* c;        // like Transformer::Buffers::x
    float* image_c;  // like image_x
    float* hinted;   // a copy of image_x with the refiner's hints; null without such hints
    void* patches;   // the input of the embedder
  };
  Buffers plan(const SampleShape& shape, Arena& arena) const;
  std::size_t latent_values(const SampleShape& shape) const;  // of Buffers::latents

  // The number of floats in the vectors of one step.
  std::size_t step_vectors() const { return blocks_.step_vectors(); }
  // vectors [steps, blocks, 4, dim], from the embedding in the transformer's table.
  void prepare_steps(const Transformer::StepTable& transformer, int steps, float* vectors,
                     const Ops& ops) const;
  // Like Transformer::evaluate.
  void evaluate(const Transformer::Evaluation& at, const float* latents,
                const Buffers& buffers) const;

  int channels() const { return config_.control_in_dim; }

 private:
  // A linear layer on c, which is not normed: in fp16 it needs a scale (export/modeling/layers.py).
  struct Projection {
    Matrix weight;
    const float* bias;
  };
  Projection projection(const Weights& weights, const std::string& name) const;
  void project(const Projection& projection, const float* c, int rows, float* out,
               const Transformer::Evaluation& at) const;
  void add_hint(const Projection& after, const float* c, int rows, float* x,
                const Transformer::Evaluation& at, const Buffers& buffers) const;
  const float* refine(const Transformer::Evaluation& at, const Buffers& buffers) const;
  void begin(const Transformer::Evaluation& at, const float* image, float* c) const;
  void run(int first, int last, const Sequences& sequences, float* c,
           const Transformer::Evaluation& at, const Buffers& buffers) const;

  ControlNetConfig config_;
  const Transformer& transformer_;
  BlockShape shape_;
  ModulatedBlocks blocks_;  // control_layers, then control_noise_refiner
  Transformer::Embedder embedder_;
  Projection before_layers_;
  std::vector<Projection> after_layers_;
  // The refiner of the control image: blocks [first_refiner_, first_refiner_ + refiners_), with
  // these projections if it makes hints.
  Projection before_refiner_{};
  std::vector<Projection> after_refiner_;
  int first_refiner_;
  int refiners_;
};

}  // namespace zimage_rt
