#include "programs/pipeline.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "zimage_rt/check.h"
#include "zimage_rt/rng.h"

namespace zimage_rt {
namespace {

// Graphs kept at most, and what they may take together.
constexpr std::size_t kMaxGraphs = 32;
constexpr std::size_t kMaxGraphBytes = std::size_t{512} << 20;

std::size_t free_bytes() {
  std::size_t free = 0, total = 0;
  ZRT_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

std::vector<float> noise(std::uint64_t seed, std::size_t count) {
  std::vector<float> values(count);
  randn(seed, values.data(), count);
  return values;
}

// Pixels a latent covers.
template <typename Vae>
std::size_t area(const Vae& vae) {
  return static_cast<std::size_t>(vae.factor()) * vae.factor();
}

bool guided_at(const SampleJob& job, int i) {
  return job.guidance.active(static_cast<std::size_t>(i), job.contexts.size());
}

template <typename T>
void upload_to(T* target, const T* source, std::size_t count, cudaStream_t stream) {
  ZRT_CUDA(cudaMemcpyAsync(target, source, count * sizeof(T), cudaMemcpyHostToDevice, stream));
}

}  // namespace

// Where one request's tensors lie in loop_memory_.
struct Pipeline::SampleBuffers {
  float* latents;
  float* kept;
  SamplerStep* steps;
  float* scales;  // of guidance, [steps, batch]
  float* normalization;
  float* mask;  // null, like the two behind it, unless a picture is kept
  float* image;
  float* noise;
  float* factors;
  std::uint8_t* pixels;
  Transformer::Buffers transformer;
  std::byte* decoder;  // shares its memory with the transformer: one runs after the other
};

struct Pipeline::Graph {
  std::vector<int> key;
  GraphExec exec;
  std::size_t bytes;
};

std::unique_ptr<Pipeline> Pipeline::make(const PipelineOptions& options) {
  const DeviceGuard guard(options.device);
  return std::unique_ptr<Pipeline>(new Pipeline(options));
}

Pipeline::Pipeline(const PipelineOptions& options)
    : options_(options), gemm_(options.cublaslt, options.cache_file), attention_(options.cudnn) {}

Pipeline::~Pipeline() = default;

#define ZRT_TURN                                            \
  const std::lock_guard<std::recursive_mutex> turn(mutex_); \
  const DeviceGuard guard(options_.device)

std::unique_ptr<Weights> Pipeline::upload(std::unique_ptr<Weights> weights,
                                          const std::string& purpose) {
  check_limit(weights->bytes(), purpose);
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
  weights_.push_back(upload(std::move(weights), "the text encoder's weights"));
  text_weights_ = weights_.back().get();
  changeable_["text_encoder"] = text_weights_;
  text_encoder_.emplace(config, *text_weights_);
  if (!options_.keep_text_encoder) text_weights_->release();
}

void Pipeline::load_context_refiner(std::unique_ptr<Weights> weights,
                                    const TransformerConfig& config) {
  ZRT_TURN;
  weights_.push_back(upload(std::move(weights), "the context refiner's weights"));
  changeable_["context_refiner"] = weights_.back().get();
  context_refiner_.emplace(config, *weights_.back());
}

void Pipeline::load_transformer(std::unique_ptr<Weights> weights, const TransformerConfig& config) {
  ZRT_TURN;
  weights_.push_back(upload(std::move(weights), "the transformer's weights"));
  changeable_["transformer"] = weights_.back().get();
  transformer_.emplace(config, *weights_.back());
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

void Pipeline::change(const std::string& module, const std::vector<LowRank>& changes) {
  ZRT_TURN;
  const auto found = changeable_.find(module);
  if (found == changeable_.end())
    throw std::invalid_argument("module: expected a loaded one with matrices, got " + module);
  stream_.synchronize();
  if (module != "text_encoder" || options_.keep_text_encoder) {
    found->second->change(changes, stream_.get());
    return;
  }
  text_factors_.clear();
  text_changes_ = changes;
  for (LowRank& change : text_changes_) {
    const auto rank = static_cast<std::size_t>(change.rank);
    change.down = text_factors_.emplace_back(change.down, change.down + rank * change.rows).data();
    change.up = text_factors_.emplace_back(change.up, change.up + rank * change.columns).data();
  }
  upload_text_encoder();  // so that what is wrong shows now
  text_weights_->release();
}

void Pipeline::upload_text_encoder() {
  check_limit(text_weights_->bytes(), "the text encoder's weights");
  text_weights_->upload("the text encoder's weights");
  if (text_changes_.empty()) return;
  try {
    text_weights_->change(text_changes_, stream_.get());
  } catch (...) {
    text_weights_->release();  // no prompt may be encoded without them
    throw;
  }
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

void Pipeline::run_text_encoder(const std::int64_t* input_ids, int tokens,
                                const TextEncoder::Buffers& at) {
  if (!text_weights_->uploaded()) upload_text_encoder();
  text_encoder_->run(input_ids, tokens, at, ops());
  if (!options_.keep_text_encoder) {
    stream_.synchronize();
    text_weights_->release();
  }
}

void Pipeline::encode(const std::int64_t* input_ids, int tokens, float* prompt_embeds) {
  ZRT_TURN;
  const TextEncoder& encoder = need(text_encoder_, "text_encoder");
  Arena size(nullptr);
  encoder.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers at = encoder.plan(tokens, memory);
  run_text_encoder(input_ids, tokens, at);
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
  const TextEncoder& encoder = need(text_encoder_, "text_encoder");
  const ContextRefiner& refiner = need(context_refiner_, "context_refiner");
  Arena size(nullptr);
  encoder.plan(tokens, size);
  refiner.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers text = encoder.plan(tokens, memory);
  const ContextRefiner::Buffers at = refiner.plan(tokens, memory);
  run_text_encoder(input_ids, tokens, text);
  refiner.run(text.x, tokens, at, ops());
  read_back(context, at.context, sizeof(float) * padded_rows(tokens) * refiner.dim());
  gemm_.save_cache();
}

void Pipeline::evaluate(const float* latents, int latent_height, int latent_width, float timestep,
                        const float* contexts, const std::vector<int>& context_rows,
                        float* noise_pred) {
  ZRT_TURN;
  const Transformer& transformer = need(transformer_, "transformer");
  const auto samples = static_cast<int>(context_rows.size());
  const SampleShape shape{samples, latent_height, latent_width, context_rows, 1};
  const PatchGrid grid = transformer.grid(shape);
  const std::size_t count = static_cast<std::size_t>(samples) * grid.values();
  const auto plan = [&](Arena& memory, float** in, float** out) {
    *in = memory.take<float>(count);
    *out = memory.take<float>(count);
    return transformer.plan(shape, memory);
  };
  float *in = nullptr, *out = nullptr;
  Arena size(nullptr);
  plan(size, &in, &out);
  Arena memory = arena(loop_memory_, size.used(), "one evaluation");
  const Transformer::Buffers at = plan(memory, &in, &out);
  upload_to(in, latents, count, stream_.get());
  upload_to(at.timesteps, &timestep, 1, stream_.get());
  upload_to(at.contexts, contexts,
            static_cast<std::size_t>(
                std::accumulate(context_rows.begin(), context_rows.end(), std::int64_t{0})) *
                transformer.dim(),
            stream_.get());
  transformer.prepare(shape, at, ops());
  transformer.evaluate(shape, samples, 0, in, at, ops());
  unpatchify(at.predicted, grid, out, samples, stream_.get());
  read_back(noise_pred, out, count * sizeof(float));
  gemm_.save_cache();
}

void Pipeline::decode(const float* latents, int batch, int latent_height, int latent_width,
                      float* image) {
  ZRT_TURN;
  const TinyVaeDecoder& decoder = need(vae_decoder_, "tiny_vae_decoder");
  const std::size_t count =
      static_cast<std::size_t>(batch) * latent_channels_ * latent_height * latent_width;
  const std::size_t out =
      static_cast<std::size_t>(batch) * 3 * latent_height * latent_width * area(decoder);
  const std::size_t work = decoder.workspace_bytes(batch, latent_height, latent_width);
  Arena size(nullptr);
  size.take<float>(count), size.take<float>(out), size.take(work);
  Arena memory = arena(side_memory_, size.used(), "decoding");
  float* const in_at = memory.take<float>(count);
  float* const out_at = memory.take<float>(out);
  upload_to(in_at, latents, count, stream_.get());
  decoder.decode(in_at, out_at, batch, latent_height, latent_width, memory.take(work),
                 stream_.get());
  read_back(image, out_at, out * sizeof(float));
}

void Pipeline::decode_pixels(const float* latents, int batch, int latent_height, int latent_width,
                             std::uint8_t* pixels) {
  ZRT_TURN;
  const TinyVaeDecoder& decoder = need(vae_decoder_, "tiny_vae_decoder");
  const std::size_t count =
      static_cast<std::size_t>(batch) * latent_channels_ * latent_height * latent_width;
  const std::size_t out =
      static_cast<std::size_t>(batch) * 3 * latent_height * latent_width * area(decoder);
  const std::size_t work = decoder.workspace_bytes(batch, latent_height, latent_width);
  Arena size(nullptr);
  size.take<float>(count), size.take<std::uint8_t>(out), size.take(work);
  Arena memory = arena(side_memory_, size.used(), "decoding");
  float* const in_at = memory.take<float>(count);
  auto* const out_at = memory.take<std::uint8_t>(out);
  upload_to(in_at, latents, count, stream_.get());
  decoder.decode_uint8(in_at, out_at, batch, latent_height, latent_width, memory.take(work),
                       stream_.get());
  read_back(pixels, out_at, out);
}

void Pipeline::encode_image(const float* image, int batch, int height, int width, float* latents) {
  ZRT_TURN;
  const TinyVaeEncoder& encoder = need(vae_encoder_, "tiny_vae_encoder");
  const std::size_t count = static_cast<std::size_t>(batch) * 3 * height * width;
  const std::size_t out =
      static_cast<std::size_t>(batch) * latent_channels_ * height * width / area(encoder);
  const std::size_t work = encoder.workspace_bytes(batch, height, width);
  Arena size(nullptr);
  size.take<float>(count), size.take<float>(out), size.take(work);
  Arena memory = arena(side_memory_, size.used(), "encoding an image");
  float* const in_at = memory.take<float>(count);
  float* const out_at = memory.take<float>(out);
  upload_to(in_at, image, count, stream_.get());
  encoder.encode(in_at, out_at, batch, height, width, memory.take(work), stream_.get());
  read_back(latents, out_at, out * sizeof(float));
}

Pipeline::SampleBuffers Pipeline::plan(const SampleShape& shape, const SampleJob& job,
                                       Arena& memory) const {
  const PatchGrid grid = transformer_->grid(shape);
  const auto batch = static_cast<std::size_t>(shape.latent_samples);
  SampleBuffers at{};
  at.latents = memory.take<float>(batch * grid.values());
  at.kept = memory.take<float>(batch * grid.values());
  at.steps = memory.take<SamplerStep>(job.steps.size());
  if (job.mask != nullptr) {
    at.mask = memory.take<float>(batch * grid.height * grid.width);
    at.image = memory.take<float>(batch * grid.values());
    at.noise = memory.take<float>(batch * grid.values());
  }
  at.scales = memory.take<float>(job.guidance.scales.size());
  at.normalization = memory.take<float>(1);
  at.factors = memory.take<float>(batch);
  std::size_t work = 0;
  if (job.pixels != nullptr) {
    at.pixels =
        memory.take<std::uint8_t>(batch * 3 * grid.height * grid.width * area(*vae_decoder_));
    work = vae_decoder_->workspace_bytes(shape.latent_samples, grid.height, grid.width);
  }
  Arena shared = memory;
  at.decoder = shared.take(work);
  at.transformer = transformer_->plan(shape, memory);
  if (shared.used() > memory.used()) memory = shared;
  return at;
}

void Pipeline::load_inputs(const SampleShape& shape, const SampleJob& job,
                           const SampleBuffers& at) {
  const cudaStream_t stream = stream_.get();
  const PatchGrid grid = transformer_->grid(shape);
  const auto batch = static_cast<std::size_t>(shape.latent_samples);
  upload_to(at.latents, job.latents, batch * grid.values(), stream);
  upload_to(at.steps, job.steps.data(), job.steps.size(), stream);
  if (job.mask != nullptr) {
    upload_to(at.mask, job.mask, batch * grid.height * grid.width, stream);
    upload_to(at.image, job.image, batch * grid.values(), stream);
    upload_to(at.noise, job.noise, batch * grid.values(), stream);
  }
  upload_to(at.scales, job.guidance.scales.data(), job.guidance.scales.size(), stream);
  upload_to(at.normalization, &job.guidance.normalization, 1, stream);
  std::vector<float> timesteps;
  for (const SamplerStep& row : job.steps) timesteps.push_back(1.0f - row.sigma);
  upload_to(at.transformer.timesteps, timesteps.data(), timesteps.size(), stream);
  float* target = at.transformer.contexts;
  const auto add = [&](const float* context, int rows) {
    const std::size_t count = static_cast<std::size_t>(rows) * transformer_->dim();
    upload_to(target, context, count, stream);
    target += count;
  };
  for (std::size_t i = 0; i < job.contexts.size(); ++i) add(job.contexts[i], job.context_rows[i]);
  if (job.guidance.ever())
    for (std::size_t i = 0; i < job.negatives.size(); ++i)
      add(job.negatives[i], job.negative_rows[i]);
}

// One evaluation and the update behind it, on the device alone.
void Pipeline::step(const SampleShape& shape, const SampleJob& job, int i,
                    const SampleBuffers& at) {
  const bool guided = guided_at(job, i);
  const int samples = guided ? 2 * shape.latent_samples : shape.latent_samples;
  transformer_->evaluate(shape, samples, i, at.latents, at.transformer, ops());
  sampler_update({at.transformer.predicted, transformer_->grid(shape), at.latents, at.kept,
                  shape.latent_samples, guided, job.guidance.normalization > 0.0f, at.steps, i,
                  at.scales, at.normalization, at.factors, at.mask, at.image, at.noise},
                 stream_.get());
}

void Pipeline::decode_samples(const SampleShape& shape, const SampleBuffers& at) {
  vae_decoder_->decode_uint8(at.latents, at.pixels, shape.latent_samples, shape.latent_height,
                             shape.latent_width, at.decoder, stream_.get());
}

// The whole request, without a look back at the host; what a graph captures.
void Pipeline::run_all(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                       unsigned event_flags) {
  const auto mark = [&](const Event& event) {
    ZRT_CUDA(cudaEventRecordWithFlags(event.get(), stream_.get(), event_flags));
  };
  mark(started_);
  transformer_->prepare(shape, at.transformer, ops());
  for (int i = 0; i < shape.steps; ++i) step(shape, job, i, at);
  mark(denoised_);
  if (job.pixels != nullptr) decode_samples(shape, at);
  mark(decoded_);
}

// The same with a callback after every step of the schedule.
bool Pipeline::run_steps(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at) {
  const PatchGrid grid = transformer_->grid(shape);
  const std::size_t bytes =
      sizeof(float) * static_cast<std::size_t>(shape.latent_samples) * grid.values();
  ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
  transformer_->prepare(shape, at.transformer, ops());
  const int count = count_steps(job.steps);
  int index = 0;
  float sigma_before = job.steps.front().sigma;
  for (int i = 0; i < shape.steps; ++i) {
    step(shape, job, i, at);
    const SamplerStep& row = job.steps[static_cast<std::size_t>(i)];
    if (row.ends == 0.0f) continue;
    read_back(job.latents, at.latents, bytes);
    if (!job.callback({index, count, sigma_before, row.sigma_next, job.latents})) return false;
    sigma_before = row.sigma_next;
    ++index;
  }
  ZRT_CUDA(cudaEventRecord(denoised_.get(), stream_.get()));
  if (job.pixels != nullptr) decode_samples(shape, at);
  ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
  return true;
}

void Pipeline::capture(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                       std::vector<int> key) {
  const std::size_t before = free_bytes();
  ZRT_CUDA(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    run_all(shape, job, at, cudaEventRecordExternal);
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  ZRT_CUDA(cudaStreamEndCapture(stream_.get(), &graph));
  GraphExec exec;
  try {
    exec = GraphExec(graph);
  } catch (...) {
    cudaGraphDestroy(graph);
    throw;
  }
  ZRT_CUDA(cudaGraphDestroy(graph));
  const std::size_t after = free_bytes();
  graphs_.push_front({std::move(key), std::move(exec), before > after ? before - after : 0});
  std::size_t bytes = 0;
  for (const Graph& kept : graphs_) bytes += kept.bytes;
  while (graphs_.size() > 1 && (graphs_.size() > kMaxGraphs || bytes > kMaxGraphBytes)) {
    bytes -= graphs_.back().bytes;
    graphs_.pop_back();
  }
}

bool Pipeline::sample(const SampleJob& job, SampleTimes& times) {
  ZRT_TURN;
  const Transformer& transformer = need(transformer_, "transformer");
  if (job.pixels != nullptr) need(vae_decoder_, "tiny_vae_decoder");
  SampleShape shape{static_cast<int>(job.contexts.size()), job.latent_height, job.latent_width,
                    job.context_rows, static_cast<int>(job.steps.size())};
  if (job.guidance.ever())
    shape.context_rows.insert(shape.context_rows.end(), job.negative_rows.begin(),
                              job.negative_rows.end());
  Arena size(nullptr);
  plan(shape, job, size);
  Arena memory = arena(loop_memory_, size.used(), "the sampler loop");
  const SampleBuffers at = plan(shape, job, memory);
  load_inputs(shape, job, at);

  if (job.callback) {
    if (!run_steps(shape, job, at)) {
      stream_.synchronize();
      return false;
    }
  } else {
    // All that decides which kernels run, on which addresses.
    std::vector<int> key = {shape.latent_samples,  shape.latent_height,
                            shape.latent_width,    shape.steps,
                            job.pixels != nullptr, job.guidance.normalization > 0.0f,
                            job.mask != nullptr};
    for (int i = 0; i < shape.steps; ++i) key.push_back(guided_at(job, i));
    key.insert(key.end(), shape.context_rows.begin(), shape.context_rows.end());
    const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                    [&](const Graph& graph) { return graph.key == key; });
    if (found != graphs_.end()) {
      graphs_.splice(graphs_.begin(), graphs_, found);
      graphs_.front().exec.launch(stream_.get());
    } else {
      // The first request of a shape runs as it goes, which times its matrix products; the graph
      // for the next one is made while the device works.
      run_all(shape, job, at, cudaEventRecordDefault);
      capture(shape, job, at, std::move(key));
    }
  }
  const std::size_t batch = job.contexts.size();
  const PatchGrid grid = transformer.grid(shape);
  if (job.pixels != nullptr)
    read_back(job.pixels, at.pixels, batch * 3 * grid.height * grid.width * area(*vae_decoder_));
  read_back(job.latents, at.latents, sizeof(float) * batch * grid.values());
  times.denoise = denoised_.since(started_) * 1e-3;
  times.decode = decoded_.since(denoised_) * 1e-3;
  gemm_.save_cache();
  return true;
}

std::vector<float> Pipeline::time(int repeats, const std::function<void()>& work) {
  work();
  stream_.synchronize();
  cudaGraph_t graph = nullptr;
  ZRT_CUDA(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
  work();
  ZRT_CUDA(cudaStreamEndCapture(stream_.get(), &graph));
  const GraphExec exec(graph);
  ZRT_CUDA(cudaGraphDestroy(graph));
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
    exec.launch(stream_.get());
    ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
    stream_.synchronize();
    if (i >= 2) times.push_back(decoded_.since(started_));
  }
  gemm_.save_cache();
  return times;
}

std::vector<float> Pipeline::time_evaluation(int latent_height, int latent_width,
                                             const std::vector<int>& context_rows, int repeats) {
  ZRT_TURN;
  const Transformer& transformer = need(transformer_, "transformer");
  const auto samples = static_cast<int>(context_rows.size());
  const SampleShape shape{samples, latent_height, latent_width, context_rows, 1};
  const std::size_t count = static_cast<std::size_t>(samples) * transformer.grid(shape).values();
  Arena size(nullptr);
  size.take<float>(count);
  transformer.plan(shape, size);
  Arena memory = arena(loop_memory_, size.used(), "one evaluation");
  float* const latents = memory.take<float>(count);
  const Transformer::Buffers at = transformer.plan(shape, memory);
  const std::size_t rows =
      std::accumulate(context_rows.begin(), context_rows.end(), std::size_t{0});
  const std::vector<float> x = noise(1, count), contexts = noise(2, rows * transformer.dim());
  const float timestep = 0.5f;
  upload_to(latents, x.data(), x.size(), stream_.get());
  upload_to(at.contexts, contexts.data(), contexts.size(), stream_.get());
  upload_to(at.timesteps, &timestep, 1, stream_.get());
  transformer.prepare(shape, at, ops());
  return time(repeats, [&] { transformer.evaluate(shape, samples, 0, latents, at, ops()); });
}

std::vector<float> Pipeline::time_text_encoder(int tokens, int repeats) {
  ZRT_TURN;
  TextEncoder& encoder = need(text_encoder_, "text_encoder");
  std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<std::int64_t>(i * 7919 % static_cast<std::size_t>(encoder.vocab_size()));
  Arena size(nullptr);
  encoder.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers at = encoder.plan(tokens, memory);
  if (!text_weights_->uploaded()) upload_text_encoder();
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    stream_.synchronize();
    ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
    encoder.run(ids.data(), tokens, at, ops());
    ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
    stream_.synchronize();
    if (i >= 2) times.push_back(decoded_.since(started_));
  }
  if (!options_.keep_text_encoder) text_weights_->release();
  gemm_.save_cache();
  return times;
}

std::vector<float> Pipeline::time_decode(int latent_height, int latent_width, int repeats) {
  ZRT_TURN;
  const TinyVaeDecoder& decoder = need(vae_decoder_, "tiny_vae_decoder");
  const std::size_t count =
      static_cast<std::size_t>(latent_channels_) * latent_height * latent_width;
  const std::size_t work = decoder.workspace_bytes(1, latent_height, latent_width);
  const std::size_t out =
      static_cast<std::size_t>(3) * latent_height * latent_width * area(decoder);
  Arena size(nullptr);
  size.take<float>(count), size.take<std::uint8_t>(out), size.take(work);
  Arena memory = arena(side_memory_, size.used(), "decoding");
  float* const latents = memory.take<float>(count);
  auto* const pixels = memory.take<std::uint8_t>(out);
  std::byte* const workspace = memory.take(work);
  const std::vector<float> x = noise(1, count);
  upload_to(latents, x.data(), count, stream_.get());
  return time(repeats, [&] {
    decoder.decode_uint8(latents, pixels, 1, latent_height, latent_width, workspace, stream_.get());
  });
}

MemoryUse Pipeline::memory() {
  ZRT_TURN;
  MemoryUse use{};
  for (const auto& weights : weights_)
    if (weights->uploaded()) use.weights += weights->bytes();
  use.workspace = loop_memory_.bytes() + side_memory_.bytes() + gemm_.workspace_bytes();
  for (const Graph& graph : graphs_) use.graphs += graph.bytes;
  ZRT_CUDA(cudaMemGetInfo(&use.free, &use.total));
  return use;
}

int Pipeline::vae_factor() const {
  if (vae_decoder_) return vae_decoder_->factor();
  if (vae_encoder_) return vae_encoder_->factor();
  throw std::runtime_error("no VAE was loaded");
}

int Pipeline::dim() const { return transformer_ ? transformer_->dim() : context_refiner_->dim(); }

}  // namespace zimage_rt
