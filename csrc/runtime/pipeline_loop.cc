// The sampler loop of a pipeline: one captured step, replayed for each row of the sampler's table.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "device/arena.h"
#include "device/check.h"
#include "kernels/copy_rows.h"
#include "kernels/patchify.h"
#include "kernels/sampler_update.h"
#include "models/tiny_vae.h"
#include "runtime/pipeline_detail.h"

namespace zimage_rt {
namespace {

// Graphs kept at most, and what they may take together. A request has three of them at most.
constexpr std::size_t kMaxGraphs = 96;
constexpr std::size_t kMaxGraphBytes = std::size_t{512} << 20;
constexpr std::size_t kGraphsOfRequest = 3;

std::size_t free_bytes() {
  std::size_t free = 0, total = 0;
  ZRT_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

bool guided_at(const SampleJob& job, std::size_t row) {
  return job.guidance.active(row, job.contexts.size());
}

// Sets a flag while it lives.
class Flagged {
 public:
  explicit Flagged(bool& flag) : flag_(flag) { flag_ = true; }
  Flagged(const Flagged&) = delete;
  Flagged& operator=(const Flagged&) = delete;
  ~Flagged() { flag_ = false; }

 private:
  bool& flag_;
};

}  // namespace

Pipeline::SampleBuffers Pipeline::plan(const SampleShape& shape, const SampleJob& job,
                                       Arena& memory) const {
  const PatchGrid grid = transformer_->grid(shape);
  const auto batch = static_cast<std::size_t>(shape.latent_samples);
  const std::size_t latents = batch * grid.values();
  SampleBuffers at{};
  at.latents = memory.take<float>(latents);
  at.kept = memory.take<float>(SamplerStep::kHistory * latents);
  at.step_noise = memory.take<float>(latents);
  at.step = memory.take<SamplerStep>(1);
  at.scales = memory.take<float>(batch);
  at.normalization = memory.take<float>(1);
  at.factors = memory.take<float>(batch);
  if (job.mask != nullptr) {
    at.mask = memory.take<float>(batch * grid.height * grid.width);
    at.image = memory.take<float>(latents);
    at.noise = memory.take<float>(latents);
  }
  Arena shared = memory;
  if (job.pixels != nullptr) {
    at.pixels =
        shared.take<std::uint8_t>(batch * 3 * grid.height * grid.width * area(*vae_decoder_));
    at.not_finite = shared.take<int>(1);
    at.decoder =
        shared.take(vae_decoder_->workspace_bytes(shape.latent_samples, grid.height, grid.width));
  }
  at.transformer = transformer_->plan(shape, memory);
  if (job.control.latents != nullptr) at.control = controlnet_->plan(shape, memory);
  if (shared.used() > memory.used()) memory = shared;
  return at;
}

Pipeline::StepTables Pipeline::plan_tables(const SampleShape& shape, const SampleJob& job,
                                           Arena& memory) const {
  const std::size_t steps = job.steps.size();
  StepTables tables{};
  tables.steps = memory.take<SamplerStep>(steps);
  tables.scales = memory.take<float>(job.guidance.scales.size());
  const std::size_t latents =
      static_cast<std::size_t>(shape.latent_samples) * transformer_->grid(shape).values();
  tables.step_noise = memory.take<float>(count_draws(job.steps) * latents);
  tables.transformer = transformer_->plan_steps(static_cast<int>(steps), memory);
  if (job.control.latents != nullptr)
    tables.control_vectors = memory.take<float>(steps * controlnet_->step_vectors());
  for (float*& seen : tables.seen) seen = memory.take<float>(latents);
  return tables;
}

void Pipeline::load_inputs(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                           const StepTables& tables) {
  const cudaStream_t stream = stream_.get();
  const PatchGrid grid = transformer_->grid(shape);
  const auto batch = static_cast<std::size_t>(shape.latent_samples);
  upload_to(at.latents, job.latents, batch * grid.values(), stream);
  upload_to(tables.steps, job.steps.data(), job.steps.size(), stream);
  if (job.step_noise != nullptr)
    upload_to(tables.step_noise, job.step_noise, count_draws(job.steps) * batch * grid.values(),
              stream);
  if (job.mask != nullptr) {
    upload_to(at.mask, job.mask, batch * grid.height * grid.width, stream);
    upload_to(at.image, job.image, batch * grid.values(), stream);
    upload_to(at.noise, job.noise, batch * grid.values(), stream);
  }
  if (job.control.latents != nullptr) {
    upload_to(at.control.latents, job.control.latents, controlnet_->latent_values(shape), stream);
    upload_to(at.control.scale, &job.control.scale, 1, stream);
  }
  upload_to(tables.scales, job.guidance.scales.data(), job.guidance.scales.size(), stream);
  upload_to(at.normalization, &job.guidance.normalization, 1, stream);
  std::vector<float> timesteps;
  for (const SamplerStep& row : job.steps) timesteps.push_back(1.0f - row.sigma);
  upload_to(tables.transformer.timesteps, timesteps.data(), timesteps.size(), stream);
  float* target = at.transformer.contexts;
  const auto add = [&](const float* context, int rows) {
    const std::size_t count = static_cast<std::size_t>(rows) * transformer_->dim();
    upload_to(target, context, count, stream);
    target += count;
  };
  for (std::size_t i = 0; i < job.contexts.size(); ++i) add(job.contexts[i], job.context_tokens[i]);
  if (job.guidance.ever())
    for (std::size_t i = 0; i < job.negatives.size(); ++i)
      add(job.negatives[i], job.negative_tokens[i]);
}

// What every evaluation needs and no latents change; the tables of all steps.
void Pipeline::prepare(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                       const StepTables& tables) {
  const auto steps = static_cast<int>(job.steps.size());
  const Ops run = ops();
  transformer_->prepare_steps(tables.transformer, steps, run);
  transformer_->prepare(shape, at.transformer, run);
  if (job.control.latents != nullptr)
    controlnet_->prepare_steps(tables.transformer, steps, tables.control_vectors, run);
}

// Makes a row of the tables the one that evaluate_step() reads.
void Pipeline::select_step(const SampleShape& shape, const SampleJob& job, std::size_t row,
                           const SampleBuffers& at, const StepTables& tables) {
  static_assert(sizeof(SamplerStep) % sizeof(float) == 0);
  CopyRows rows;
  const auto add = [&](const float* table, float* current, std::size_t count) {
    rows.add(table + row * count, current, count);
  };
  add(reinterpret_cast<const float*>(tables.steps), reinterpret_cast<float*>(at.step),
      sizeof(SamplerStep) / sizeof(float));
  add(tables.scales, at.scales, static_cast<std::size_t>(shape.latent_samples));
  add(tables.transformer.vectors, at.transformer.vectors, transformer_->step_vectors());
  add(tables.transformer.scales, at.transformer.scales,
      static_cast<std::size_t>(transformer_->dim()));
  if (job.control.latents != nullptr)
    add(tables.control_vectors, at.control.vectors, controlnet_->step_vectors());
  if (job.steps[row].noise != 0.0f) {
    const std::size_t latents =
        static_cast<std::size_t>(shape.latent_samples) * transformer_->grid(shape).values();
    rows.add(tables.step_noise + count_draws(job.steps, row) * latents, at.step_noise, latents);
  }
  copy_rows(rows, stream_.get());
}

// One evaluation and the update behind it, on the device alone.
void Pipeline::evaluate_step(const SampleShape& shape, const SampleJob& job, bool guided,
                             const SampleBuffers& at) {
  const int samples = guided ? 2 * shape.latent_samples : shape.latent_samples;
  const Ops run = ops();
  const Transformer::Evaluation evaluation{
      .shape = shape, .samples = samples, .buffers = at.transformer, .ops = run};
  if (job.control.latents != nullptr)
    controlnet_->evaluate(evaluation, at.latents, at.control);
  else
    transformer_->evaluate(evaluation, at.latents);
  sampler_update({.patches = at.transformer.predicted,
                  .grid = transformer_->grid(shape),
                  .latents = at.latents,
                  .kept = at.kept,
                  .samples = shape.latent_samples,
                  .guided = guided,
                  .normalized = job.guidance.normalization > 0.0f,
                  .steps = at.step,
                  .step = 0,
                  .scales = at.scales,
                  .normalization = at.normalization,
                  .factors = at.factors,
                  .step_noise = at.step_noise,
                  .mask = at.mask,
                  .image = at.image,
                  .noise = at.noise},
                 stream_.get());
}

// Replays a piece of a request. The first time it runs kernel by kernel, which times its matrix
// products; its graph for the next time is made while the device works.
void Pipeline::run_piece(const SampleShape& shape, const SampleJob& job, Piece piece,
                         const std::function<void()>& work) {
  // All that decides which kernels run, on which addresses: not the number of steps.
  std::vector<int> key = {static_cast<int>(piece), shape.latent_samples, shape.latent_height,
                          shape.latent_width, job.mask != nullptr};
  if (piece != Piece::kDecode) {
    key.push_back(job.guidance.normalization > 0.0f);
    key.push_back(job.control.latents != nullptr);
    key.insert(key.end(), shape.context_tokens.begin(), shape.context_tokens.end());
  }
  const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                  [&](const Graph& graph) { return graph.key == key; });
  if (found != graphs_.end()) {
    graphs_.splice(graphs_.begin(), graphs_, found);
    graphs_.front().exec.launch(stream_.get());
  } else {
    work();
    capture(std::move(key), work);
  }
}

void Pipeline::capture(std::vector<int> key, const std::function<void()>& work) {
  const std::size_t before = free_bytes();
  ZRT_CUDA(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    work();
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
  graphs_.push_front({.key = std::move(key),
                      .exec = std::move(exec),
                      .bytes = before > after ? before - after : 0});
}

// Forgets the graphs that were not used for longest, so that one more request fits. Between
// requests, when none of them runs.
void Pipeline::trim_graphs() {
  std::size_t bytes = 0;
  for (const Graph& kept : graphs_) bytes += kept.bytes;
  while (graphs_.size() > kMaxGraphs - kGraphsOfRequest ||
         (graphs_.size() > kGraphsOfRequest && bytes > kMaxGraphBytes)) {
    bytes -= graphs_.back().bytes;
    graphs_.pop_back();
  }
}

bool Pipeline::run_steps(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                         const StepTables& tables) {
  const int count = count_steps(job.steps);
  const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(shape.latent_samples) *
                            transformer_->grid(shape).values();
  std::size_t row = 0;  // the next one of the table

  // Sends a step of the schedule to the device, and behind the last one the decoder.
  const auto launch = [&](int index) {
    for (bool ended = false; !ended; ++row) {
      const bool guided = guided_at(job, row);
      select_step(shape, job, row, at, tables);
      run_piece(shape, job, guided ? Piece::kGuidedStep : Piece::kStep,
                [&] { evaluate_step(shape, job, guided, at); });
      ended = job.steps[row].ends != 0.0f;
    }
    if (job.callback) {
      // The next step changes the latents while this one's callback may read them.
      ZRT_CUDA(cudaMemcpyAsync(tables.seen[index % 2], at.latents, bytes, cudaMemcpyDeviceToDevice,
                               stream_.get()));
      ZRT_CUDA(cudaEventRecord(step_done_[index % 2].get(), stream_.get()));
    }
    if (index + 1 < count) return;
    ZRT_CUDA(cudaEventRecord(denoised_.get(), stream_.get()));
    if (job.pixels != nullptr)
      run_piece(shape, job, Piece::kDecode, [&] {
        vae_decoder_->decode_uint8(at.latents, at.pixels, at.not_finite, shape.latent_samples,
                                   shape.latent_height, shape.latent_width, at.decoder,
                                   stream_.get());
      });
    ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
  };

  if (!job.callback) {
    for (int i = 0; i < count; ++i) launch(i);
    return true;
  }
  launch(0);
  float sigma = job.steps.front().sigma;
  std::size_t told = 0;  // rows whose steps callbacks know
  for (int i = 0; i < count; ++i) {
    // One step ahead, so that the device does not wait for the callback.
    if (i + 1 < count) launch(i + 1);
    ZRT_CUDA(cudaEventSynchronize(step_done_[i % 2].get()));
    while (job.steps[told].ends == 0.0f) ++told;
    const float sigma_next = job.steps[told++].sigma_next;
    const auto read_latents = [&](float* target) {
      const DeviceGuard guard(options_.device);
      ZRT_CUDA(cudaMemcpyAsync(target, tables.seen[i % 2], bytes, cudaMemcpyDeviceToHost,
                               side_stream_.get()));
      side_stream_.synchronize();
    };
    if (!job.callback({.index = i,
                       .count = count,
                       .sigma = sigma,
                       .sigma_next = sigma_next,
                       .read_latents = read_latents})) {
      read_latents(job.latents);
      return false;
    }
    sigma = sigma_next;
  }
  return true;
}

bool Pipeline::sample(const SampleJob& job, SampleTimes& times) {
  const PipelineLock lock(mutex_, options_.device);
  const Transformer& transformer = need(transformer_, "transformer");
  if (job.pixels != nullptr) need(vae_decoder_, "tiny_vae_decoder");
  if (job.control.latents != nullptr) need(controlnet_, "controlnet");
  if (job.steps.empty() || job.steps.back().ends == 0.0f)
    throw std::invalid_argument("steps: expected a last row that ends a step of the schedule");
  SampleShape shape{.latent_samples = static_cast<int>(job.contexts.size()),
                    .latent_height = job.latent_height,
                    .latent_width = job.latent_width,
                    .context_tokens = job.context_tokens};
  if (job.guidance.ever())
    shape.context_tokens.insert(shape.context_tokens.end(), job.negative_tokens.begin(),
                                job.negative_tokens.end());
  Arena size(nullptr);
  plan(shape, job, size);
  Arena memory = arena(loop_memory_, size.used(), "the sampler loop");
  const SampleBuffers at = plan(shape, job, memory);
  Arena table_size(nullptr);
  plan_tables(shape, job, table_size);
  Arena table_memory = arena(table_memory_, table_size.used(), "the sampler loop's steps");
  const StepTables tables = plan_tables(shape, job, table_memory);
  const Flagged sampling(sampling_);
  const StreamDrain drain(stream_);
  trim_graphs();
  load_inputs(shape, job, at, tables);

  ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
  prepare(shape, job, at, tables);
  if (!run_steps(shape, job, at, tables)) return false;
  const std::size_t batch = job.contexts.size();
  const PatchGrid grid = transformer.grid(shape);
  const std::size_t values = batch * grid.values();
  if (job.pixels != nullptr)
    read_back(job.pixels, at.pixels, batch * 3 * grid.height * grid.width * area(*vae_decoder_),
              stream_);
  read_back(job.latents, at.latents, sizeof(float) * values, stream_);
  // Latents that are not finite are the transformer's fault, which the caller sees in them.
  if (job.pixels != nullptr && read_flag(at.not_finite, stream_) &&
      std::all_of(job.latents, job.latents + values, [](float x) { return std::isfinite(x); }))
    throw NotFiniteError("tiny_vae_decoder");
  times.denoise = denoised_.since(started_) * 1e-3;
  times.decode = decoded_.since(denoised_) * 1e-3;
  gemm_.save_cache();
  return true;
}

}  // namespace zimage_rt
