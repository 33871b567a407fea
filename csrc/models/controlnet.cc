#include "models/controlnet.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/residual.h"
#include "ops/linear.h"

namespace zimage_rt {
namespace {

const char* const kLayers = "control_layers";
const char* const kRefiner = "control_noise_refiner";

std::string block_name(const char* list, int i) {
  return std::string(list) + "." + std::to_string(i) + ".";
}

void check_places(const char* name, const std::vector<int>& places, int layers) {
  bool rising = !places.empty();
  for (std::size_t i = 0; i < places.size(); ++i)
    rising = rising && places[i] >= (i == 0 ? 0 : places[i - 1] + 1) && places[i] < layers;
  if (!rising)
    throw WeightError(std::string(name) + ": expected rising numbers below " +
                      std::to_string(layers) + "; export the bundle again");
}

const ControlNetConfig& checked(const ControlNetConfig& config, const Transformer& transformer) {
  const TransformerConfig& wanted = transformer.config();
  if (config.transformer.dim != wanted.dim || config.transformer.n_layers != wanted.n_layers)
    throw WeightError("controlnet: it is for another transformer; export the bundle again");
  const std::string& kind = config.add_control_noise_refiner;
  if (!kind.empty() && kind != kLayers && kind != kRefiner)
    throw WeightError("add_control_noise_refiner: this version does not know " + kind);
  check_places("control_layers_places", config.control_layers_places, wanted.n_layers);
  if (config.control_layers_places[0] != 0)
    throw WeightError("control_layers_places: expected 0 first; export the bundle again");
  if (!kind.empty())
    check_places("control_refiner_layers_places", config.control_refiner_layers_places,
                 wanted.n_refiner_layers);
  return config;
}

std::vector<std::string> block_names(const ControlNetConfig& config) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < config.control_layers_places.size(); ++i)
    names.push_back(block_name(kLayers, static_cast<int>(i)));
  if (config.add_control_noise_refiner != kLayers)
    for (int i = 0; i < config.control_refiner_layers; ++i)
      names.push_back(block_name(kRefiner, i));
  return names;
}

}  // namespace

ControlNet::ControlNet(const ControlNetConfig& config, const Weights& weights,
                       const Transformer& transformer)
    : config_(checked(config, transformer)),
      transformer_(transformer),
      shape_(config.transformer.block_shape(weights.storage())),
      blocks_(config.transformer, weights, block_names(config),
              "the ControlNet's modulation table") {
  if (shape_.type != transformer.type() || blocks_.width() != transformer.width())
    throw WeightError("controlnet: expected the transformer's number format and modulation width");
  const int patch = config.transformer.patch_size;
  const std::string name = "control_all_x_embedder." + std::to_string(patch) + "-1.";
  embedder_ = {
      .channels = config.control_in_dim,
      .weight = weights.matrix(name + "weight", patch * patch * config.control_in_dim, shape_.dim),
      .bias = weights.vector(name + "bias", shape_.dim)};

  const int layers = static_cast<int>(config.control_layers_places.size());
  before_layers_ = projection(weights, block_name(kLayers, 0) + "before_proj.");
  for (int i = 0; i < layers; ++i)
    after_layers_.push_back(projection(weights, block_name(kLayers, i) + "after_proj."));
  const bool shared = config.add_control_noise_refiner == kLayers;
  first_refiner_ = shared ? 0 : layers;
  refiners_ = shared ? layers : config.control_refiner_layers;
  if (config.add_control_noise_refiner.empty()) return;
  const char* const list = shared ? kLayers : kRefiner;
  before_refiner_ = projection(weights, block_name(list, 0) + "before_proj.");
  const int hints =
      std::min(refiners_, static_cast<int>(config.control_refiner_layers_places.size()));
  for (int i = 0; i < hints; ++i)
    after_refiner_.push_back(projection(weights, block_name(list, i) + "after_proj."));
}

ControlNet::Projection ControlNet::projection(const Weights& weights,
                                              const std::string& name) const {
  return {weights.matrix(name + "weight", shape_.dim, shape_.dim),
          weights.vector(name + "bias", shape_.dim)};
}

std::size_t ControlNet::latent_values(const SampleShape& shape) const {
  return static_cast<std::size_t>(shape.latent_samples) * config_.control_in_dim *
         shape.latent_height * shape.latent_width;
}

ControlNet::Buffers ControlNet::plan(const SampleShape& shape, Arena& arena) const {
  const auto samples = static_cast<int>(shape.context_tokens.size());
  const std::size_t image = static_cast<std::size_t>(samples) * transformer_.image_tokens(shape);
  const std::size_t image_size = image * shape_.dim;
  const int patch = config_.transformer.patch_size;
  Buffers buffers{};
  buffers.latents = arena.take<float>(latent_values(shape));
  buffers.scale = arena.take<float>(1);
  buffers.vectors = arena.take<float>(blocks_.step_vectors());
  buffers.c =
      arena.take<float>(static_cast<std::size_t>(transformer_.rows(shape, samples)) * shape_.dim);
  buffers.image_c = samples == 1 ? buffers.c : arena.take<float>(image_size);
  if (!after_refiner_.empty()) buffers.hinted = arena.take<float>(image_size);
  buffers.patches =
      arena.take(image * patch * patch * config_.control_in_dim * size_of(shape_.type));
  return buffers;
}

void ControlNet::prepare_steps(const Transformer::StepTable& transformer, int steps, float* vectors,
                               const Ops& ops) const {
  blocks_.prepare(transformer.embedding, steps, vectors, ops.stream);
}

void ControlNet::evaluate(const Transformer::Evaluation& at, const float* latents,
                          const Buffers& buffers) const {
  const Transformer::Buffers& main = at.buffers;
  transformer_.begin(at);
  transformer_.embed(at, transformer_.embedder(), latents, main.patches, main.image_x);
  transformer_.embed(at, embedder_, buffers.latents, buffers.patches, buffers.image_c);
  const float* const hinted = refine(at, buffers);
  transformer_.join(at, main.image_x, main.x);
  transformer_.join(at, buffers.image_c, buffers.c);
  begin(at, hinted, buffers.c);

  const Sequences sequences = transformer_.sequences(at);
  int done = 0;
  for (std::size_t i = 0; i < after_layers_.size(); ++i) {
    const int place = config_.control_layers_places[i], layer = static_cast<int>(i);
    transformer_.run_layers(at, done, place + 1);
    run(layer, layer + 1, sequences, buffers.c, at, buffers);
    add_hint(after_layers_[i], buffers.c, sequences.rows, main.x, at, buffers);
    done = place + 1;
  }
  transformer_.run_layers(at, done, config_.transformer.n_layers);
  transformer_.predict(at);
}

// Refines image_c, and image_x with the transformer's noise refiner. Returns the image that the
// control stream reads: image_x or, if the refiner has hints of its own, a copy with these added,
// which the transformer does not use.
const float* ControlNet::refine(const Transformer::Evaluation& at, const Buffers& buffers) const {
  float* const image_x = at.buffers.image_x;
  const Sequences images = transformer_.image_sequences(at);
  const int last = config_.transformer.n_refiner_layers;
  if (after_refiner_.empty()) {
    run(first_refiner_, first_refiner_ + refiners_, images, buffers.image_c, at, buffers);
    transformer_.refine(at, 0, last, image_x);
    return image_x;
  }
  const std::size_t count = static_cast<std::size_t>(images.rows) * shape_.dim;
  ZRT_CUDA(cudaMemcpyAsync(buffers.hinted, image_x, count * sizeof(float), cudaMemcpyDeviceToDevice,
                           at.ops.stream));
  project(before_refiner_, buffers.image_c, images.rows, buffers.image_c, at);
  scaled_add(buffers.image_c, image_x, nullptr, count, at.ops.stream);
  // Hints are in the order of the blocks after which they are added.
  int done = 0;
  for (int i = 0; i < refiners_; ++i) {
    run(first_refiner_ + i, first_refiner_ + i + 1, images, buffers.image_c, at, buffers);
    if (i >= static_cast<int>(after_refiner_.size())) continue;
    const int place = config_.control_refiner_layers_places[static_cast<std::size_t>(i)];
    transformer_.refine(at, done, place + 1, buffers.hinted);
    add_hint(after_refiner_[static_cast<std::size_t>(i)], buffers.image_c, images.rows,
             buffers.hinted, at, buffers);
    done = place + 1;
  }
  transformer_.refine(at, done, last, buffers.hinted);
  transformer_.refine(at, 0, last, image_x);
  return buffers.hinted;
}

// c = before_proj(c) + (image, context), sample by sample.
void ControlNet::begin(const Transformer::Evaluation& at, const float* image, float* c) const {
  project(before_layers_, c, transformer_.rows(at.shape, at.samples), c, at);
  const std::size_t dim = shape_.dim, image_size = transformer_.image_tokens(at.shape) * dim;
  const float* context = at.buffers.contexts;
  for (int i = 0; i < at.samples; ++i) {
    const std::size_t context_size = at.shape.context_tokens[i] * dim;
    scaled_add(c, image + i * image_size, nullptr, image_size, at.ops.stream);
    scaled_add(c + image_size, context, nullptr, context_size, at.ops.stream);
    c += image_size + context_size;
    context += context_size;
  }
}

void ControlNet::run(int first, int last, const Sequences& sequences, float* c,
                     const Transformer::Evaluation& at, const Buffers& buffers) const {
  blocks_.run(first, last, buffers.vectors, c, sequences, at.buffers.block, at.ops);
}

// out = projection(c); `out` may be c, because the product reads a rounded copy. The scale is that
// of the product alone: the bias is added after it.
void ControlNet::project(const Projection& projection, const float* c, int rows, float* out,
                         const Transformer::Evaluation& at) const {
  void* const rounded = at.buffers.block.normed;
  scaled_copy(c, shape_.attention_scale, rounded, shape_.type,
              static_cast<std::size_t>(rows) * shape_.dim, at.ops.stream);
  linear({.x = rounded,
          .weight = projection.weight,
          .bias = projection.bias,
          .out = out,
          .out_type = DType::kFloat32,
          .rows = rows,
          .alpha = 1.0f / shape_.attention_scale},
         at.ops);
}

// x += scale * after_proj(c).
void ControlNet::add_hint(const Projection& after, const float* c, int rows, float* x,
                          const Transformer::Evaluation& at, const Buffers& buffers) const {
  // Scratch of the blocks, none of which runs now: 16-bit rows of at least 3 * dim hold fp32 rows
  // of dim.
  auto* const hint = static_cast<float*>(at.buffers.block.wide);
  project(after, c, rows, hint, at);
  scaled_add(x, hint, buffers.scale, static_cast<std::size_t>(rows) * shape_.dim, at.ops.stream);
}

}  // namespace zimage_rt
