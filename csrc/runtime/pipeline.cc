#include "runtime/pipeline.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/arena.h"
#include "device/check.h"
#include "kernels/fused_gemm.h"
#include "kernels/patchify.h"
#include "models/reference.h"
#include "models/vae.h"
#include "ops/ops.h"
#include "runtime/pipeline_detail.h"
#include "weights/streamed_blocks.h"
#include "weights/weights.h"

namespace zimage_rt {
std::unique_ptr<Pipeline> Pipeline::make(const PipelineOptions& options) {
  const DeviceGuard guard(options.device);
  return std::unique_ptr<Pipeline>(new Pipeline(options));
}

Pipeline::Pipeline(const PipelineOptions& options)
    : options_(options),
      gemm_(options.cublaslt, options.cache_file),
      cudnn_(CudnnAttention::open(options.cudnn)) {
  if (!options.fused_gemm || !fused_gemm_runs_here()) return;
  fused_workspace_ = DeviceBuffer::zeroed(fused_gemm_workspace_bytes(), "matrix products");
}

Pipeline::~Pipeline() = default;

// Device memory that counts for the limit. The group of a text encoder that is not kept is always
// reserved, so that a new prompt never fails after an image was drawn.
std::size_t Pipeline::used() {
  const MemoryUse use = memory();
  const auto encoder = weights_.find("text_encoder");
  const bool reserved = encoder != weights_.end() && !encoder->second->uploaded();
  return use.weights + use.workspace + use.graphs + (reserved ? encoder->second->bytes() : 0);
}

// Makes room for `more` bytes within the limit: streams more layers of the transformer if it must,
// and drops graphs, which are captured again, if that is not enough. What needed room keeps it,
// like the workspaces, so layers never become resident again.
void Pipeline::check_limit(std::size_t more, const std::string& purpose) {
  const std::size_t limit = options_.memory_limit;
  if (limit == 0) return;
  const std::size_t now = used(), needed = now + more;
  if (needed <= limit) return;
  const std::size_t missing = needed - limit, graphs = graphs_.bytes();
  const std::size_t freed = stream_layers(missing);
  if (freed >= missing) return;
  if (freed + graphs < missing)
    throw OutOfMemoryError(purpose, more, limit - std::min(now, limit), needed - freed);
  stream_.synchronize();
  graphs_.clear();
  if (missing > graphs) stream_layers(missing - graphs);
}

// Makes room for graphs as far as layers give it: their size is known only after their capture.
void Pipeline::make_room() {
  const std::size_t limit = options_.memory_limit;
  if (limit == 0) return;
  const std::size_t now = used();
  if (now <= limit) return;
  const std::size_t freed = stream_layers(now - limit);
  if (0 < freed && freed < now - limit) stream_layers(freed);
}

// Streams more layers until `missing` bytes are free, and returns how many are. If streaming all
// layers is not enough, changes nothing and returns what that would free.
std::size_t Pipeline::stream_layers(std::size_t missing) {
  if (!transformer_) return 0;
  const Weights& weights = *weights_.at("transformer");
  StreamedBlocks& layers = *weights.blocks();
  const std::size_t before = layers.device_bytes();
  const std::size_t most = before - std::min(before, layers.device_bytes(layers.count()));
  if (missing > most) return most;
  const int count = layers.fewest(before - missing);
  stream_.synchronize();
  graphs_.clear();
  transformer_->stream_layers(count, weights, stream_.get());
  return before - layers.device_bytes();
}

// An arena over a buffer, which grows to `bytes` if it is smaller. Growing loses its contents, and
// the graphs that hold its addresses.
Arena Pipeline::arena(DeviceBuffer& buffer, std::size_t bytes, const char* purpose) {
  if (&buffer == &loop_memory_ && sampling_)
    throw std::invalid_argument(std::string(purpose) +
                                ": not from the callback of a request, which uses the memory; "
                                "begin it when the callback has returned");
  if (buffer.bytes() < bytes) {
    stream_.synchronize();
    if (&buffer == &loop_memory_) graphs_.clear();
    if (&buffer == &side_memory_) prompt_graphs_.clear();
    buffer.release();
    check_limit(bytes, purpose);
    buffer = DeviceBuffer(bytes, purpose);
  }
  return Arena(buffer.data());
}

void Pipeline::read_back(void* target, const void* source, std::size_t bytes,
                         const Stream& stream) {
  if (staging_.bytes() < bytes) staging_ = PinnedBuffer(bytes);
  ZRT_CUDA(cudaMemcpyAsync(staging_.data(), source, bytes, cudaMemcpyDeviceToHost, stream.get()));
  stream.synchronize();
  std::memcpy(target, staging_.data(), bytes);
}

// Runs `work` with the text encoder's weights on the device. Unless they are kept, they are
// uploaded before and released after it.
void Pipeline::with_text_encoder(const std::function<void()>& work) {
  if (options_.keep_text_encoder) return work();
  Weights& weights = *weights_.at("text_encoder");
  check_limit(0, kTextEncoderWeights);  // used() has its bytes
  weights.upload(kTextEncoderWeights);
  try {
    work();
    stream_.synchronize();
  } catch (...) {
    cudaStreamSynchronize(stream_.get());
    weights.release();
    throw;
  }
  weights.release();
}

// Leaves the prompt's embedding at the start of at.x. Resident layers are captured per number of
// rows, because their kernels are shorter than a launch.
void Pipeline::run_text_encoder(const std::int64_t* input_ids, int tokens,
                                const TextEncoder::Buffers& at) {
  TextEncoder& encoder = *text_encoder_;
  with_text_encoder([&] {
    encoder.load_prompt(input_ids, tokens, at, ops());
    const auto layers = [&] { encoder.run_layers(tokens, at, ops()); };
    if (!options_.keep_text_encoder) return layers();
    prompt_graphs_.trim();
    prompt_graphs_.run({TextEncoder::padded(tokens)}, stream_.get(), layers);
  });
}

void Pipeline::encode(const std::int64_t* input_ids, int tokens, float* prompt_embeds) {
  const PipelineLock lock(mutex_, options_.device);
  TextEncoder& encoder = need(text_encoder_, "text_encoder");
  Arena size(nullptr);
  encoder.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers at = encoder.plan(tokens, memory);
  const StreamDrain drain(stream_);
  run_text_encoder(input_ids, tokens, at);
  read_back(prompt_embeds, at.x, sizeof(float) * tokens * encoder.hidden_size(), stream_);
  gemm_.save_cache();
}

void Pipeline::refine(const float* prompt_embeds, int tokens, float* context) {
  const PipelineLock lock(mutex_, options_.device);
  const ContextRefiner& refiner = need(context_refiner_, "context_refiner");
  const std::size_t count = static_cast<std::size_t>(tokens) * refiner.embed_dim();
  Arena size(nullptr);
  size.take<float>(count);
  refiner.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "refining a prompt");
  float* const embeds = memory.take<float>(count);
  const ContextRefiner::Buffers at = refiner.plan(tokens, memory);
  const StreamDrain drain(stream_);
  upload_to(embeds, prompt_embeds, count, stream_.get());
  refiner.run(embeds, tokens, at, ops());
  read_back(context, at.context, sizeof(float) * padded_tokens(tokens) * refiner.dim(), stream_);
  gemm_.save_cache();
}

void Pipeline::context(const std::int64_t* input_ids, int tokens, float* context) {
  const PipelineLock lock(mutex_, options_.device);
  TextEncoder& encoder = need(text_encoder_, "text_encoder");
  const ContextRefiner& refiner = need(context_refiner_, "context_refiner");
  Arena size(nullptr);
  encoder.plan(tokens, size);
  refiner.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers text = encoder.plan(tokens, memory);
  const ContextRefiner::Buffers at = refiner.plan(tokens, memory);
  const StreamDrain drain(stream_);
  run_text_encoder(input_ids, tokens, text);
  refiner.run(text.x, tokens, at, ops());
  read_back(context, at.context, sizeof(float) * padded_tokens(tokens) * refiner.dim(), stream_);
  gemm_.save_cache();
}

void Pipeline::evaluate(const float* latents, int latent_height, int latent_width, float timestep,
                        const float* contexts, const std::vector<int>& context_tokens,
                        const std::optional<Control>& control, float* noise_pred) {
  const PipelineLock lock(mutex_, options_.device);
  const Transformer& transformer = need(transformer_, "transformer");
  const bool controlled = control.has_value();
  if (controlled) need(controlnet_, "controlnet");
  const auto samples = static_cast<int>(context_tokens.size());
  const SampleShape shape{.latent_samples = samples,
                          .latent_height = latent_height,
                          .latent_width = latent_width,
                          .context_tokens = context_tokens};
  const PatchGrid grid = transformer.grid(shape);
  const std::size_t count = static_cast<std::size_t>(samples) * grid.values();
  float *in = nullptr, *out = nullptr;
  Transformer::StepTable table{};
  ControlNet::Buffers control_buffers{};
  const auto plan = [&](Arena& memory) {
    in = memory.take<float>(count);
    out = memory.take<float>(count);
    table = transformer.plan_steps(1, memory);
    Transformer::Buffers buffers = transformer.plan(shape, memory);
    // The only step is the current one.
    buffers.vectors = table.vectors, buffers.scales = table.scales;
    if (controlled) control_buffers = controlnet_->plan(shape, memory);
    return buffers;
  };
  Arena size(nullptr);
  plan(size);
  Arena memory = arena(loop_memory_, size.used(), "one evaluation");
  const Transformer::Buffers at = plan(memory);
  upload_to(in, latents, count, stream_.get());
  upload_to(table.timesteps, &timestep, 1, stream_.get());
  upload_to(at.contexts, contexts,
            static_cast<std::size_t>(
                std::accumulate(context_tokens.begin(), context_tokens.end(), std::int64_t{0})) *
                transformer.dim(),
            stream_.get());
  const Ops run = ops();
  transformer.prepare_steps(table, 1, run);
  transformer.prepare(shape, at, run);
  if (controlled) {
    upload_to(control_buffers.latents, control->latents, controlnet_->latent_values(shape),
              stream_.get());
    upload_to(control_buffers.scale, &control->scale, 1, stream_.get());
    controlnet_->prepare_steps(table, 1, control_buffers.vectors, run);
    controlnet_->evaluate({.shape = shape, .samples = samples, .buffers = at, .ops = run}, in,
                          control_buffers);
  } else {
    transformer.evaluate({.shape = shape, .samples = samples, .buffers = at, .ops = run}, in);
  }
  unpatchify(at.predicted, grid, out, samples, stream_.get());
  read_back(noise_pred, out, count * sizeof(float), stream_);
  gemm_.save_cache();
}

// Decodes to values of T. `run` takes the latents, the output, the flag for values that are not
// finite and a workspace, all on the device, and the stream to work on.
template <typename T, typename Run>
void Pipeline::decode_to(const std::string& module, const float* latents, int batch,
                         int latent_height, int latent_width, T* target, Run&& run) {
  const VaeDecoder& decoder = need(vae_decoders_, module);
  const std::size_t size = static_cast<std::size_t>(batch) * latent_height * latent_width;
  const std::size_t in = size * decoder.latent_channels(), out = size * 3 * area(decoder);
  const std::size_t work = decoder.workspace_bytes(latent_height, latent_width);
  Arena measure(nullptr);
  measure.take<float>(in), measure.take<T>(out), measure.take<int>(1), measure.take(work);
  Arena memory = arena(side_memory_, measure.used(), "decoding");
  float* const in_at = memory.take<float>(in);
  T* const out_at = memory.take<T>(out);
  int* const not_finite = memory.take<int>(1);
  const Stream& stream = stream_of(decoder);
  const StreamDrain drain(stream);
  ZRT_CUDA(cudaMemsetAsync(not_finite, 0, sizeof(int), stream.get()));
  upload_to(in_at, latents, in, stream.get());
  run(decoder, in_at, out_at, not_finite, memory.take(work), ops(stream));
  read_back(target, out_at, out * sizeof(T), stream);
  if (read_flag(not_finite, stream)) throw NotFiniteError(module);
  gemm_.save_cache();
}

void Pipeline::decode(const std::string& module, const float* latents, int batch, int latent_height,
                      int latent_width, float* image) {
  const PipelineLock lock(mutex_, options_.device);
  decode_to(module, latents, batch, latent_height, latent_width, image,
            [&](const VaeDecoder& decoder, const float* in, float* out, int*, std::byte* work,
                const Ops& run) {
              decoder.decode(in, out, batch, latent_height, latent_width, work, run);
            });
}

void Pipeline::decode_pixels(const std::string& module, const float* latents, int batch,
                             int latent_height, int latent_width, std::uint8_t* pixels) {
  const PipelineLock lock(mutex_, options_.device);
  decode_to(module, latents, batch, latent_height, latent_width, pixels,
            [&](const VaeDecoder& decoder, const float* in, std::uint8_t* out, int* not_finite,
                std::byte* work, const Ops& run) {
              decoder.decode_uint8(in, out, not_finite, batch, latent_height, latent_width, work,
                                   run);
            });
}

// Encodes values of T. `run` takes the image, the latents and a workspace, all on the device, and
// the stream to work on.
template <typename T, typename Run>
void Pipeline::encode_from(const std::string& module, const T* source, int batch, int height,
                           int width, float* latents, Run&& run) {
  const VaeEncoder& encoder = need(vae_encoders_, module);
  check_image_size(encoder, height, width);
  const int latent_height = height / encoder.factor(), latent_width = width / encoder.factor();
  const std::size_t in = static_cast<std::size_t>(batch) * 3 * height * width;
  const std::size_t out =
      static_cast<std::size_t>(batch) * encoder.latent_channels() * latent_height * latent_width;
  const std::size_t work = encoder.workspace_bytes(latent_height, latent_width);
  Arena measure(nullptr);
  measure.take<T>(in), measure.take<float>(out), measure.take(work);
  Arena memory = arena(side_memory_, measure.used(), "encoding an image");
  T* const in_at = memory.take<T>(in);
  float* const out_at = memory.take<float>(out);
  const Stream& stream = stream_of(encoder);
  const StreamDrain drain(stream);
  upload_to(in_at, source, in, stream.get());
  run(encoder, in_at, out_at, memory.take(work), ops(stream));
  read_back(latents, out_at, out * sizeof(float), stream);
  gemm_.save_cache();
}

void Pipeline::encode_image(const std::string& module, const float* image, int batch, int height,
                            int width, float* latents) {
  const PipelineLock lock(mutex_, options_.device);
  encode_from(module, image, batch, height, width, latents,
              [&](const VaeEncoder& encoder, const float* in, float* out, std::byte* work,
                  const Ops& run) { encoder.encode(in, out, batch, height, width, work, run); });
}

void Pipeline::encode_pixels(const std::string& module, const std::uint8_t* pixels, int batch,
                             int height, int width, float* latents) {
  const PipelineLock lock(mutex_, options_.device);
  encode_from(
      module, pixels, batch, height, width, latents,
      [&](const VaeEncoder& encoder, const std::uint8_t* in, float* out, std::byte* work,
          const Ops& run) { encoder.encode_uint8(in, out, batch, height, width, work, run); });
}

MemoryUse Pipeline::memory() {
  const PipelineLock lock(mutex_, options_.device);
  MemoryUse use{};
  for (const auto& [module, weights] : weights_)
    if (weights->uploaded()) use.weights += weights->bytes();
  for (const auto& [module, decoder] : vae_decoders_) use.weights += decoder->weight_bytes();
  for (const auto& [module, encoder] : vae_encoders_) use.weights += encoder->weight_bytes();
  use.workspace = loop_memory_.bytes() + table_memory_.bytes() + side_memory_.bytes() +
                  gemm_.workspace_bytes() + fused_workspace_.bytes() + split_workspace_.bytes();
  use.graphs = graphs_.bytes() + prompt_graphs_.bytes();
  ZRT_CUDA(cudaMemGetInfo(&use.free, &use.total));
  return use;
}

Streaming Pipeline::streaming() {
  const PipelineLock lock(mutex_, options_.device);
  const StreamedBlocks* const layers =
      transformer_ ? weights_.at("transformer")->blocks() : nullptr;
  if (layers == nullptr) return {.layers = 0, .host_bytes = 0};
  return {.layers = layers->streamed(), .host_bytes = layers->host_bytes()};
}

const Vae& Pipeline::vae(const std::string& module) const {
  if (vae_decoders_.count(module) != 0) return *vae_decoders_.at(module);
  return need(vae_encoders_, module);
}

int Pipeline::control_channels() const {
  if (!controlnet_) throw std::runtime_error("controlnet was not loaded");
  return controlnet_->channels();
}

int Pipeline::dim() const { return transformer_ ? transformer_->dim() : context_refiner_->dim(); }

}  // namespace zimage_rt
