// The modules of a pipeline: how each is loaded, and patches of its weights.

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "device/device.h"
#include "kernels/mma_gemm_8bit.h"
#include "models/block.h"
#include "models/controlnet.h"
#include "models/full_vae.h"
#include "models/text_encoder.h"
#include "models/tiny_vae.h"
#include "models/transformer.h"
#include "runtime/pipeline_detail.h"
#include "weights/streamed_blocks.h"
#include "weights/weights.h"

namespace zimage_rt {

namespace {

// The 8-bit format of a module; none of those without blocks.
Quantization quantization(const ModuleConfig& config) {
  if (const auto* transformer = std::get_if<TransformerConfig>(&config))
    return transformer->quantization;
  if (const auto* controlled = std::get_if<ControlNetConfig>(&config))
    return controlled->transformer.quantization;
  if (const auto* encoder = std::get_if<TextEncoderConfig>(&config)) return encoder->quantization;
  return {};
}

}  // namespace

// The steps of loading a module.
struct Pipeline::ModuleKind {
  const char* weights;  // their name in errors
  bool patchable;       // see Pipeline::patch
  // Before the upload; may be null.
  void (*prepare)(Pipeline& pipeline, Weights& weights, const ModuleConfig& config);
  // Constructs the model, which refers to the weights; after an error there is none.
  void (*construct)(Pipeline& pipeline, const std::string& module, Weights& weights,
                    const ModuleConfig& config);

  static void prepare_blocks(Pipeline&, Weights& weights, const ModuleConfig&) {
    transpose_block_matrices(weights);
  }

  static void prepare_transformer(Pipeline& self, Weights& weights, const ModuleConfig& config) {
    transpose_block_matrices(weights);
    if (self.options_.memory_limit == 0) return;
    split_layers(std::get<TransformerConfig>(config), weights);
    // As many layers are resident as fit now; other modules and workspaces get room when they come.
    StreamedBlocks& layers = *weights.blocks();
    const std::size_t others =
        self.used() + weights.bytes() - layers.device_bytes() + weights.staging_bytes();
    const std::size_t limit = self.options_.memory_limit;
    layers.plan(std::min(layers.fewest(limit - std::min(others, limit)), layers.count()));
  }

  template <auto kModel, typename Config>
  static void emplace(Pipeline& self, const std::string&, Weights& weights,
                      const ModuleConfig& config) {
    (self.*kModel).emplace(std::get<Config>(config), weights);
  }

  // `Model` packs its weights, so that the file's are needed no more.
  template <typename Model, typename Config, auto kModels>
  static void emplace_vae(Pipeline& self, const std::string& module, Weights& weights,
                          const ModuleConfig& config) {
    auto model = std::make_unique<Model>(std::get<Config>(config), weights);
    (self.*kModels)[module] = std::move(model);
    weights.release();
  }

  static void prepare_text_encoder(Pipeline& self, Weights& weights, const ModuleConfig&) {
    if (!self.options_.keep_text_encoder) TextEncoder::stream(weights);
  }

  static void emplace_text_encoder(Pipeline& self, const std::string& module, Weights& weights,
                                   const ModuleConfig& config) {
    emplace<&Pipeline::text_encoder_, TextEncoderConfig>(self, module, weights, config);
    if (!self.options_.keep_text_encoder) weights.release();
  }

  static void prepare_controlnet(Pipeline& self, Weights& weights, const ModuleConfig&) {
    need(self.transformer_, "transformer");
    transpose_block_matrices(weights);
  }

  static void emplace_controlnet(Pipeline& self, const std::string&, Weights& weights,
                                 const ModuleConfig& config) {
    self.controlnet_.emplace(std::get<ControlNetConfig>(config), weights, *self.transformer_);
  }
};

const std::map<std::string, Pipeline::ModuleKind>& Pipeline::module_kinds() {
  using Kind = ModuleKind;
  static const std::map<std::string, ModuleKind> kinds = {
      {"text_encoder",
       {.weights = kTextEncoderWeights,
        .patchable = true,
        .prepare = Kind::prepare_text_encoder,
        .construct = Kind::emplace_text_encoder}},
      {"context_refiner",
       {.weights = "the context refiner's weights",
        .patchable = true,
        .prepare = Kind::prepare_blocks,
        .construct = Kind::emplace<&Pipeline::context_refiner_, TransformerConfig>}},
      {"transformer",
       {.weights = "the transformer's weights",
        .patchable = true,
        .prepare = Kind::prepare_transformer,
        .construct = Kind::emplace<&Pipeline::transformer_, TransformerConfig>}},
      {"controlnet",
       {.weights = "the ControlNet's weights",
        .patchable = false,
        .prepare = Kind::prepare_controlnet,
        .construct = Kind::emplace_controlnet}},
      {"tiny_vae_decoder",
       {.weights = "the decoder's weights",
        .patchable = false,
        .prepare = nullptr,
        .construct = Kind::emplace_vae<TinyVaeDecoder, TinyVaeConfig, &Pipeline::vae_decoders_>}},
      {"tiny_vae_encoder",
       {.weights = "the encoder's weights",
        .patchable = false,
        .prepare = nullptr,
        .construct = Kind::emplace_vae<TinyVaeEncoder, TinyVaeConfig, &Pipeline::vae_encoders_>}},
      {"full_vae_decoder",
       {.weights = "the decoder's weights",
        .patchable = false,
        .prepare = nullptr,
        .construct = Kind::emplace_vae<FullVaeDecoder, FullVaeConfig, &Pipeline::vae_decoders_>}},
      {"full_vae_encoder",
       {.weights = "the encoder's weights",
        .patchable = false,
        .prepare = nullptr,
        .construct = Kind::emplace_vae<FullVaeEncoder, FullVaeConfig, &Pipeline::vae_encoders_>}},
  };
  return kinds;
}

int Pipeline::module_index(const std::string& module) {
  return static_cast<int>(std::distance(module_kinds().begin(), module_kinds().find(module)));
}

void Pipeline::load(const std::string& module, std::unique_ptr<Weights> weights,
                    const ModuleConfig& config) {
  const PipelineLock lock(mutex_, options_.device);
  const auto found = module_kinds().find(module);
  if (found == module_kinds().end())
    throw std::invalid_argument("no program runs the module " + module);
  if (weights_.count(module) != 0)
    throw std::invalid_argument(module + " is loaded already; open a new pipeline to replace it");
  const ModuleKind& kind = found->second;
  if (quantization(config).is_on && fused_workspace_.data() == nullptr &&
      split_workspace_.data() == nullptr)
    split_workspace_ = DeviceBuffer::zeroed(mma_gemm_8bit_workspace_bytes(), "matrix products");
  if (quantization(config).rotates) weights->set_rotated();
  if (kind.prepare != nullptr) kind.prepare(*this, *weights, config);
  check_limit(weights->bytes() + weights->staging_bytes(), kind.weights);
  weights->upload(kind.weights);
  // The map's node is allocated before the model and merged after it, so that no error leaves half
  // a module.
  std::map<std::string, std::unique_ptr<Weights>> loaded;
  Weights& uploaded = *loaded.emplace(module, std::move(weights)).first->second;
  kind.construct(*this, module, uploaded, config);
  weights_.merge(loaded);
}

void Pipeline::patch(const std::string& module, const std::vector<WeightPatch>& patches, bool add) {
  const PipelineLock lock(mutex_, options_.device);
  const auto found = weights_.find(module);
  if (found == weights_.end() || !module_kinds().at(module).patchable)
    throw std::invalid_argument("module: expected a loaded one with matrices, got " + module);
  Weights& weights = *found->second;
  stream_.synchronize();
  if (weights.streams()) {
    // used() has the bytes of the current patches.
    const std::size_t bytes = weights.bytes_with(patches, add), now = weights.bytes();
    check_limit(bytes - std::min(bytes, now), kTextEncoderWeights);
  } else {
    check_limit(weights.patch_bytes(patches), "the LoRAs");
  }
  weights.patch(patches, stream_.get(), add);
}

}  // namespace zimage_rt
