#include "programs/pipeline.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/fused_gemm.h"
#include "programs/pipeline_detail.h"

namespace zimage_rt {
namespace {

constexpr char kTextEncoderWeights[] = "the text encoder's weights";

}  // namespace

std::unique_ptr<Pipeline> Pipeline::make(const PipelineOptions& options) {
  const DeviceGuard guard(options.device);
  return std::unique_ptr<Pipeline>(new Pipeline(options));
}

Pipeline::Pipeline(const PipelineOptions& options)
    : options_(options), gemm_(options.cublaslt, options.cache_file), attention_(options.cudnn) {
  if (!options.fused_gemm || !fused_gemm_runs_here()) return;
  fused_workspace_ = DeviceBuffer(fused_gemm_workspace_bytes(), "matrix products");
  ZRT_CUDA(cudaMemset(fused_workspace_.data(), 0, fused_workspace_.bytes()));
}

Pipeline::~Pipeline() = default;

std::unique_ptr<Weights> Pipeline::upload(std::unique_ptr<Weights> weights,
                                          const std::string& purpose) {
  check_limit(weights->bytes() + weights->staging_bytes(), purpose);
  weights->upload(purpose);
  return weights;
}

void Pipeline::check_limit(std::size_t more, const std::string& purpose) {
  if (options_.memory_limit == 0) return;
  const MemoryUse use = memory();
  const std::size_t used = use.weights + use.workspace + use.graphs;
  if (used + more > options_.memory_limit)
    throw OutOfMemoryError(purpose + " (memory_limit)", more,
                           options_.memory_limit - std::min(used, options_.memory_limit));
}

void Pipeline::load_text_encoder(std::unique_ptr<Weights> weights,
                                 const TextEncoderConfig& config) {
  ZRT_TURN;
  if (!options_.keep_text_encoder) TextEncoder::stream(*weights);
  weights_.push_back(upload(std::move(weights), kTextEncoderWeights));
  text_weights_ = weights_.back().get();
  changeable_["text_encoder"] = text_weights_;
  text_encoder_.emplace(config, *text_weights_);
  if (!options_.keep_text_encoder) text_weights_->release();
}

void Pipeline::load_context_refiner(std::unique_ptr<Weights> weights,
                                    const TransformerConfig& config) {
  ZRT_TURN;
  turn_block_matrices(*weights);
  weights_.push_back(upload(std::move(weights), "the context refiner's weights"));
  changeable_["context_refiner"] = weights_.back().get();
  context_refiner_.emplace(config, *weights_.back());
}

void Pipeline::load_transformer(std::unique_ptr<Weights> weights, const TransformerConfig& config) {
  ZRT_TURN;
  turn_block_matrices(*weights);
  weights_.push_back(upload(std::move(weights), "the transformer's weights"));
  changeable_["transformer"] = weights_.back().get();
  transformer_.emplace(config, *weights_.back());
}

void Pipeline::load_controlnet(std::unique_ptr<Weights> weights, const ControlNetConfig& config) {
  ZRT_TURN;
  const Transformer& transformer = need(transformer_, "transformer");
  turn_block_matrices(*weights);
  weights = upload(std::move(weights), "the ControlNet's weights");
  // Kept only if they fit: every request that wants them tries again.
  controlnet_.emplace(config, *weights, transformer);
  weights_.push_back(std::move(weights));
}

void Pipeline::load_vae_decoder(std::unique_ptr<Weights> weights, const TinyVaeConfig& config) {
  ZRT_TURN;
  weights_.push_back(upload(std::move(weights), "the decoder's weights"));
  vae_decoder_.emplace(config, *weights_.back());
  latent_channels_ = config.latent_channels;
}

void Pipeline::load_vae_encoder(std::unique_ptr<Weights> weights, const TinyVaeConfig& config) {
  ZRT_TURN;
  weights_.push_back(upload(std::move(weights), "the encoder's weights"));
  vae_encoder_.emplace(config, *weights_.back());
  latent_channels_ = config.latent_channels;
}

void Pipeline::change(const std::string& module, const std::vector<LowRank>& changes, bool add) {
  ZRT_TURN;
  const auto found = changeable_.find(module);
  if (found == changeable_.end())
    throw std::invalid_argument("module: expected a loaded one with matrices, got " + module);
  stream_.synchronize();
  if (found->second->streams())
    check_limit(found->second->bytes_with(changes, add), kTextEncoderWeights);
  found->second->change(changes, stream_.get(), add);
}

// At least `bytes` of a buffer that grows: what it held, and graphs that point into it, are lost.
Arena Pipeline::arena(DeviceBuffer& buffer, std::size_t bytes, const char* purpose) {
  if (buffer.bytes() < bytes) {
    stream_.synchronize();
    if (&buffer == &loop_memory_) graphs_.clear();
    buffer.release();
    check_limit(bytes, purpose);
    buffer = DeviceBuffer(bytes, purpose);
  }
  return Arena(buffer.data());
}

void Pipeline::read_back(void* target, const void* source, std::size_t bytes) {
  if (staging_.bytes() < bytes) staging_ = PinnedBuffer(bytes);
  ZRT_CUDA(cudaMemcpyAsync(staging_.data(), source, bytes, cudaMemcpyDeviceToHost, stream_.get()));
  stream_.synchronize();
  std::memcpy(target, staging_.data(), bytes);
}

// Runs `work` with the text encoder's weights on the device, or the memory that they come to. Where
// they are not kept, the memory is given back.
void Pipeline::with_text_encoder(const std::function<void()>& work) {
  if (options_.keep_text_encoder) return work();
  check_limit(text_weights_->bytes(), kTextEncoderWeights);
  text_weights_->upload(kTextEncoderWeights);
  try {
    work();
    stream_.synchronize();
  } catch (...) {
    cudaStreamSynchronize(stream_.get());
    text_weights_->release();
    throw;
  }
  text_weights_->release();
}

void Pipeline::encode(const std::int64_t* input_ids, int tokens, float* prompt_embeds) {
  ZRT_TURN;
  TextEncoder& encoder = need(text_encoder_, "text_encoder");
  Arena size(nullptr);
  encoder.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers at = encoder.plan(tokens, memory);
  with_text_encoder([&] { encoder.run(input_ids, tokens, at, ops()); });
  read_back(prompt_embeds, at.x, sizeof(float) * tokens * encoder.hidden_size());
  gemm_.save_cache();
}

void Pipeline::refine(const float* prompt_embeds, int tokens, float* context) {
  ZRT_TURN;
  const ContextRefiner& refiner = need(context_refiner_, "context_refiner");
  const std::size_t count = static_cast<std::size_t>(tokens) * refiner.embed_dim();
  Arena size(nullptr);
  size.take<float>(count);
  refiner.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "refining a prompt");
  float* const embeds = memory.take<float>(count);
  const ContextRefiner::Buffers at = refiner.plan(tokens, memory);
  upload_to(embeds, prompt_embeds, count, stream_.get());
  refiner.run(embeds, tokens, at, ops());
  read_back(context, at.context, sizeof(float) * padded_rows(tokens) * refiner.dim());
  gemm_.save_cache();
}

void Pipeline::context(const std::int64_t* input_ids, int tokens, float* context) {
  ZRT_TURN;
  TextEncoder& encoder = need(text_encoder_, "text_encoder");
  const ContextRefiner& refiner = need(context_refiner_, "context_refiner");
  Arena size(nullptr);
  encoder.plan(tokens, size);
  refiner.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers text = encoder.plan(tokens, memory);
  const ContextRefiner::Buffers at = refiner.plan(tokens, memory);
  with_text_encoder([&] { encoder.run(input_ids, tokens, text, ops()); });
  refiner.run(text.x, tokens, at, ops());
  read_back(context, at.context, sizeof(float) * padded_rows(tokens) * refiner.dim());
  gemm_.save_cache();
}

void Pipeline::evaluate(const float* latents, int latent_height, int latent_width, float timestep,
                        const float* contexts, const std::vector<int>& context_rows,
                        const Control& control, float* noise_pred) {
  ZRT_TURN;
  const Transformer& transformer = need(transformer_, "transformer");
  const bool controlled = control.latents != nullptr;
  if (controlled) need(controlnet_, "controlnet");
  const auto samples = static_cast<int>(context_rows.size());
  const SampleShape shape{samples, latent_height, latent_width, context_rows, 1};
  const PatchGrid grid = transformer.grid(shape);
  const std::size_t count = static_cast<std::size_t>(samples) * grid.values();
  float *in = nullptr, *out = nullptr;
  ControlNet::Buffers beside{};
  const auto plan = [&](Arena& memory) {
    in = memory.take<float>(count);
    out = memory.take<float>(count);
    const Transformer::Buffers buffers = transformer.plan(shape, memory);
    if (controlled) beside = controlnet_->plan(shape, memory);
    return buffers;
  };
  Arena size(nullptr);
  plan(size);
  Arena memory = arena(loop_memory_, size.used(), "one evaluation");
  const Transformer::Buffers at = plan(memory);
  upload_to(in, latents, count, stream_.get());
  upload_to(at.timesteps, &timestep, 1, stream_.get());
  upload_to(at.contexts, contexts,
            static_cast<std::size_t>(
                std::accumulate(context_rows.begin(), context_rows.end(), std::int64_t{0})) *
                transformer.dim(),
            stream_.get());
  const Ops run = ops();
  transformer.prepare(shape, at, run);
  if (controlled) {
    upload_to(beside.latents, control.latents, controlnet_->latent_values(shape), stream_.get());
    upload_to(beside.scale, &control.scale, 1, stream_.get());
    controlnet_->prepare(shape, at, beside, run);
    controlnet_->evaluate({shape, samples, 0, at, run}, in, beside);
  } else {
    transformer.evaluate({shape, samples, 0, at, run}, in);
  }
  unpatchify(at.predicted, grid, out, samples, stream_.get());
  read_back(noise_pred, out, count * sizeof(float));
  gemm_.save_cache();
}

// Decodes to values of T: `run` is given the latents, the output and a workspace on the device.
template <typename T, typename Run>
void Pipeline::decode_to(const float* latents, int batch, int latent_height, int latent_width,
                         T* target, Run&& run) {
  const TinyVaeDecoder& decoder = need(vae_decoder_, "tiny_vae_decoder");
  const std::size_t size = static_cast<std::size_t>(batch) * latent_height * latent_width;
  const std::size_t in = size * latent_channels_, out = size * 3 * area(decoder);
  const std::size_t work = decoder.workspace_bytes(batch, latent_height, latent_width);
  Arena measure(nullptr);
  measure.take<float>(in), measure.take<T>(out), measure.take(work);
  Arena memory = arena(side_memory_, measure.used(), "decoding");
  float* const in_at = memory.take<float>(in);
  T* const out_at = memory.take<T>(out);
  upload_to(in_at, latents, in, stream_.get());
  run(decoder, in_at, out_at, memory.take(work));
  read_back(target, out_at, out * sizeof(T));
}

void Pipeline::decode(const float* latents, int batch, int latent_height, int latent_width,
                      float* image) {
  ZRT_TURN;
  decode_to(latents, batch, latent_height, latent_width, image,
            [&](const TinyVaeDecoder& decoder, const float* in, float* out, std::byte* work) {
              decoder.decode(in, out, batch, latent_height, latent_width, work, stream_.get());
            });
}

void Pipeline::decode_pixels(const float* latents, int batch, int latent_height, int latent_width,
                             std::uint8_t* pixels) {
  ZRT_TURN;
  decode_to(
      latents, batch, latent_height, latent_width, pixels,
      [&](const TinyVaeDecoder& decoder, const float* in, std::uint8_t* out, std::byte* work) {
        decoder.decode_uint8(in, out, batch, latent_height, latent_width, work, stream_.get());
      });
}

// Encodes values of T: `run` is given the picture, the latents and a workspace on the device.
template <typename T, typename Run>
void Pipeline::encode_from(const T* source, int batch, int height, int width, float* latents,
                           Run&& run) {
  const TinyVaeEncoder& encoder = need(vae_encoder_, "tiny_vae_encoder");
  const std::size_t in = static_cast<std::size_t>(batch) * 3 * height * width;
  const std::size_t out =
      static_cast<std::size_t>(batch) * latent_channels_ * height * width / area(encoder);
  const std::size_t work = encoder.workspace_bytes(batch, height, width);
  Arena measure(nullptr);
  measure.take<T>(in), measure.take<float>(out), measure.take(work);
  Arena memory = arena(side_memory_, measure.used(), "encoding an image");
  T* const in_at = memory.take<T>(in);
  float* const out_at = memory.take<float>(out);
  upload_to(in_at, source, in, stream_.get());
  run(encoder, in_at, out_at, memory.take(work));
  read_back(latents, out_at, out * sizeof(float));
}

void Pipeline::encode_image(const float* image, int batch, int height, int width, float* latents) {
  ZRT_TURN;
  encode_from(image, batch, height, width, latents,
              [&](const TinyVaeEncoder& encoder, const float* in, float* out, std::byte* work) {
                encoder.encode(in, out, batch, height, width, work, stream_.get());
              });
}

void Pipeline::encode_pixels(const std::uint8_t* pixels, int batch, int height, int width,
                             float* latents) {
  ZRT_TURN;
  encode_from(
      pixels, batch, height, width, latents,
      [&](const TinyVaeEncoder& encoder, const std::uint8_t* in, float* out, std::byte* work) {
        encoder.encode_uint8(in, out, batch, height, width, work, stream_.get());
      });
}

MemoryUse Pipeline::memory() {
  ZRT_TURN;
  MemoryUse use{};
  for (const auto& weights : weights_)
    if (weights->uploaded()) use.weights += weights->bytes();
  use.workspace = loop_memory_.bytes() + side_memory_.bytes() + gemm_.workspace_bytes() +
                  fused_workspace_.bytes();
  for (const Graph& graph : graphs_) use.graphs += graph.bytes;
  ZRT_CUDA(cudaMemGetInfo(&use.free, &use.total));
  return use;
}

int Pipeline::vae_factor() const {
  if (vae_decoder_) return vae_decoder_->factor();
  if (vae_encoder_) return vae_encoder_->factor();
  throw std::runtime_error("no VAE was loaded");
}

int Pipeline::control_channels() const {
  if (!controlnet_) throw std::runtime_error("controlnet was not loaded");
  return controlnet_->channels();
}

int Pipeline::dim() const { return transformer_ ? transformer_->dim() : context_refiner_->dim(); }

}  // namespace zimage_rt
