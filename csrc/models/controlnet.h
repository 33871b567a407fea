#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "device/arena.h"
#include "models/transformer.h"

namespace zimage_rt {

// A ControlNet's numbers as the manifest has them (export/modeling/controlnet.py).
struct ControlNetConfig {
  TransformerConfig transformer;  // of what it controls
  int control_in_dim;
  std::vector<int> control_layers_places;
  std::vector<int> control_refiner_layers_places;
  int control_refiner_layers;
  // What refines the control image: "" plain blocks (Fun-Union 1), "control_layers" the control
  // layers, over the image alone (2.0), "control_noise_refiner" control blocks of their own (2.1).
  std::string add_control_noise_refiner;
};

// Runs beside a transformer: a second stream c, which begins as the control image, and of which
// projections, the hints, are added to the transformer's stream x. A hint is added as soon as it is
// made, so that there is never more than one.
class ControlNet {
 public:
  // Looks up all weights. Throws WeightError. Both the transformer and the weights must stay.
  ControlNet(const ControlNetConfig& config, const Weights& weights,
             const Transformer& transformer);

  struct Buffers {
    float* latents;  // [latent_samples, control_in_dim, h, w]: the control images'
    float* scale;    // [1]: what hints are multiplied by
    float* vectors;  // of the step that runs, [blocks, 4, dim]
    float* c;        // like Transformer::Buffers::x
    float* image_c;  // like image_x
    float* seen;     // like image_x, with a memory of its own; null where nothing hints at it
    void* patches;   // what the embedder reads
  };
  Buffers plan(const SampleShape& shape, Arena& arena) const;
  std::size_t latent_values(const SampleShape& shape) const;  // of Buffers::latents

  // Floats of one step's vectors.
  std::size_t step_vectors() const { return blocks_.step_vectors(); }
  // vectors [steps, blocks, 4, dim], from the embedding of the transformer's table.
  void prepare_steps(const Transformer::StepTable& transformer, int steps, float* vectors,
                     const Ops& ops) const;
  // Like Transformer::evaluate.
  void evaluate(const Transformer::Evaluation& at, const float* latents,
                const Buffers& buffers) const;

  int channels() const { return config_.control_in_dim; }

 private:
  // A matrix over c as it is, not normed, so that fp16 needs a scale (export/modeling/layers.py).
  struct Projection {
    const void* weight;
    const float* bias;
  };
  Projection projection(const Weights& weights, const std::string& name) const;
  void project(const Projection& projection, const float* c, int rows, float* out,
               const Transformer::Evaluation& at) const;
  void add_hint(const Projection& after, const float* c, int rows, float* x,
                const Transformer::Evaluation& at, const Buffers& buffers) const;
  const float* refine(const Transformer::Evaluation& at, const Buffers& buffers) const;
  void begin(const Transformer::Evaluation& at, const float* seen, float* c) const;
  void run(int first, int last, const Sequences& sequences, float* c,
           const Transformer::Evaluation& at, const Buffers& buffers) const;

  ControlNetConfig config_;
  const Transformer& transformer_;
  BlockShape shape_;
  ModulatedBlocks blocks_;  // control_layers, then control_noise_refiner
  Transformer::Embedder embedder_;
  Projection before_layers_;
  std::vector<Projection> after_layers_;
  // Of the blocks that refine the control image, where those make hints; the first of these blocks
  // is number first_refiner_, and there are refiners_.
  Projection before_refiner_{};
  std::vector<Projection> after_refiner_;
  int first_refiner_;
  int refiners_;
};

}  // namespace zimage_rt
