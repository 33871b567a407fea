// The sampler loop of a pipeline: captured steps, replayed for the rows of the sampler's table.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/sampler.h"
#include "device/arena.h"
#include "device/check.h"
#include "device/device.h"
#include "kernels/copy_rows.h"
#include "kernels/sampler_update.h"
#include "models/controlnet.h"
#include "models/transformer.h"
#include "models/vae.h"
#include "ops/ops.h"
#include "runtime/pipeline_detail.h"

namespace zimage_rt {
namespace {

// Sets a flag for a scope.
class ScopedFlag {
 public:
  explicit ScopedFlag(bool& flag) : flag_(flag) { flag_ = true; }
  ScopedFlag(const ScopedFlag&) = delete;
  ScopedFlag& operator=(const ScopedFlag&) = delete;
  ~ScopedFlag() { flag_ = false; }

 private:
  bool& flag_;
};

SampleShape shape_of(const SampleJob& job, const Conditioning& conditioning) {
  SampleShape shape{.latent_samples = job.shape.batch,
                    .latent_height = job.shape.height,
                    .latent_width = job.shape.width,
                    .context_tokens = {}};
  for (const Context& context : conditioning.contexts)
    shape.context_tokens.push_back(context.tokens);
  if (job.guidance.ever())
    for (const Context& context : conditioning.negatives)
      shape.context_tokens.push_back(context.tokens);
  return shape;
}

}  // namespace

Pipeline::SampleBuffers Pipeline::plan(const Request& request, Arena& memory) const {
  const SampleShape& shape = request.shape;
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
  if (request.job.inpaint) {
    at.mask = memory.take<float>(batch * grid.height * grid.width);
    at.image = memory.take<float>(latents);
    at.noise = memory.take<float>(latents);
  }
  Arena shared = memory;
  if (request.pixels != nullptr) {
    const VaeDecoder& decoder = need(vae_decoders_, request.decoder);
    at.pixels = shared.take<std::uint8_t>(batch * 3 * grid.height * grid.width * area(decoder));
    at.not_finite = shared.take<int>(1);
    at.decoder = shared.take(decoder.workspace_bytes(grid.height, grid.width));
  }
  at.transformer = transformer_->plan(shape, memory);
  if (request.conditioning.control) at.control = controlnet_->plan(shape, memory);
  if (shared.used() > memory.used()) memory = shared;
  return at;
}

Pipeline::StepTables Pipeline::plan_tables(const Request& request, Arena& memory) const {
  const SampleJob& job = request.job;
  const std::size_t steps = job.steps.size(), latents = job.shape.size();
  StepTables tables{};
  tables.steps = memory.take<SamplerStep>(steps);
  tables.scales = memory.take<float>(job.guidance.scales.size());
  tables.step_noise = memory.take<float>(count_draws(job.steps) * latents);
  tables.transformer = transformer_->plan_steps(static_cast<int>(steps), memory);
  if (request.conditioning.control)
    tables.control_vectors = memory.take<float>(steps * controlnet_->step_vectors());
  for (float*& snapshot : tables.snapshots) snapshot = memory.take<float>(latents);
  return tables;
}

void Pipeline::load_inputs(const Request& request, const SampleBuffers& at,
                           const StepTables& tables) {
  const cudaStream_t stream = stream_.get();
  const SampleJob& job = request.job;
  const Conditioning& conditioning = request.conditioning;
  const std::size_t latents = job.shape.size();
  upload_to(at.latents, job.latents, latents, stream);
  upload_to(tables.steps, job.steps.data(), job.steps.size(), stream);
  if (job.step_noise != nullptr)
    upload_to(tables.step_noise, job.step_noise, count_draws(job.steps) * latents, stream);
  if (job.inpaint) {
    const auto batch = static_cast<std::size_t>(job.shape.batch);
    upload_to(at.mask, job.inpaint->mask, batch * job.shape.area(), stream);
    upload_to(at.image, job.inpaint->image, latents, stream);
    upload_to(at.noise, job.inpaint->noise, latents, stream);
  }
  if (conditioning.control) {
    upload_to(at.control.latents, conditioning.control->latents,
              controlnet_->latent_values(request.shape), stream);
    upload_to(at.control.scale, &conditioning.control->scale, 1, stream);
  }
  upload_to(tables.scales, job.guidance.scales.data(), job.guidance.scales.size(), stream);
  upload_to(at.normalization, &job.guidance.normalization, 1, stream);
  std::vector<float> timesteps;
  for (const SamplerStep& row : job.steps) timesteps.push_back(1.0f - row.sigma);
  upload_to(tables.transformer.timesteps, timesteps.data(), timesteps.size(), stream);
  float* target = at.transformer.contexts;
  const auto add = [&](const Context& context) {
    const std::size_t count = static_cast<std::size_t>(context.tokens) * transformer_->dim();
    upload_to(target, context.data, count, stream);
    target += count;
  };
  for (const Context& context : conditioning.contexts) add(context);
  if (job.guidance.ever())
    for (const Context& context : conditioning.negatives) add(context);
}

// Computes what depends on no latents: the positions, and the tables of all steps.
void Pipeline::prepare(const Request& request, const SampleBuffers& at, const StepTables& tables) {
  const auto steps = static_cast<int>(request.job.steps.size());
  const Ops run = ops();
  transformer_->prepare_steps(tables.transformer, steps, run);
  transformer_->prepare(request.shape, at.transformer, run);
  if (request.conditioning.control)
    controlnet_->prepare_steps(tables.transformer, steps, tables.control_vectors, run);
}

// Copies a row of the tables to the tensors of the current step, which evaluate_step() reads.
void Pipeline::select_step(const Request& request, std::size_t row, const SampleBuffers& at,
                           const StepTables& tables) {
  static_assert(sizeof(SamplerStep) % sizeof(float) == 0);
  CopyRows rows;
  const auto add = [&](const float* table, float* current, std::size_t count) {
    rows.add(table + row * count, current, count);
  };
  add(reinterpret_cast<const float*>(tables.steps), reinterpret_cast<float*>(at.step),
      sizeof(SamplerStep) / sizeof(float));
  add(tables.scales, at.scales, static_cast<std::size_t>(request.shape.latent_samples));
  add(tables.transformer.vectors, at.transformer.vectors, transformer_->step_vectors());
  add(tables.transformer.scales, at.transformer.scales,
      static_cast<std::size_t>(transformer_->dim()));
  if (request.conditioning.control)
    add(tables.control_vectors, at.control.vectors, controlnet_->step_vectors());
  if (request.job.steps[row].noise != 0.0f) {
    const std::size_t latents = request.job.shape.size();
    rows.add(tables.step_noise + count_draws(request.job.steps, row) * latents, at.step_noise,
             latents);
  }
  copy_rows(rows, stream_.get());
}

// One evaluation and the update after it, on the device only.
void Pipeline::evaluate_step(const Request& request, bool guided, const SampleBuffers& at) {
  const SampleShape& shape = request.shape;
  const int samples = guided ? 2 * shape.latent_samples : shape.latent_samples;
  const Ops run = ops();
  const Transformer::Evaluation evaluation{
      .shape = shape, .samples = samples, .buffers = at.transformer, .ops = run};
  if (request.conditioning.control)
    controlnet_->evaluate(evaluation, at.latents, at.control);
  else
    transformer_->evaluate(evaluation, at.latents);
  sampler_update({.patches = at.transformer.predicted,
                  .grid = transformer_->grid(shape),
                  .latents = at.latents,
                  .kept = at.kept,
                  .samples = shape.latent_samples,
                  .guided = guided,
                  .normalized = request.job.guidance.normalization > 0.0f,
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

// Runs a captured part of a request. The key does not depend on the number of steps.
void Pipeline::run_graph(const Request& request, GraphKind kind,
                         const std::function<void()>& work) {
  const SampleShape& shape = request.shape;
  GraphCache::Key key = {static_cast<int>(kind), shape.latent_samples, shape.latent_height,
                         shape.latent_width, request.job.inpaint.has_value()};
  if (kind == GraphKind::kDecode) {
    key.push_back(module_index(request.decoder));
  } else {
    key.push_back(request.job.guidance.normalization > 0.0f);
    key.push_back(request.conditioning.control.has_value());
    key.insert(key.end(), shape.context_tokens.begin(), shape.context_tokens.end());
  }
  graphs_.run(std::move(key), stream_.get(), work);
}

// Launches step `index` of the schedule, which begins with row `row` of the table; advances `row`.
void Pipeline::launch_step(const Request& request, std::size_t& row, int index,
                           const SampleBuffers& at, const StepTables& tables) {
  const SampleJob& job = request.job;
  for (bool ended = false; !ended; ++row) {
    const bool guided = job.guidance.active(row, static_cast<std::size_t>(job.shape.batch));
    select_step(request, row, at, tables);
    run_graph(request, guided ? GraphKind::kGuidedStep : GraphKind::kStep,
              [&] { evaluate_step(request, guided, at); });
    ended = job.steps[row].ends != 0.0f;
  }
  if (!job.on_step) return;
  // The next step changes the latents while the callback of this one may read them.
  ZRT_CUDA(cudaMemcpyAsync(tables.snapshots[index % 2], at.latents,
                           sizeof(float) * job.shape.size(), cudaMemcpyDeviceToDevice,
                           stream_.get()));
  ZRT_CUDA(cudaEventRecord(step_done_[index % 2].get(), stream_.get()));
}

// Marks the end of the loop, and launches the decoder if pixels are asked for.
void Pipeline::launch_decode(const Request& request, const SampleBuffers& at) {
  ZRT_CUDA(cudaEventRecord(denoised_.get(), stream_.get()));
  const SampleShape& shape = request.shape;
  if (request.pixels != nullptr)
    run_graph(request, GraphKind::kDecode, [&] {
      need(vae_decoders_, request.decoder)
          .decode_uint8(at.latents, at.pixels, at.not_finite, shape.latent_samples,
                        shape.latent_height, shape.latent_width, at.decoder, ops());
    });
  ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
}

bool Pipeline::run_steps(const Request& request, const SampleBuffers& at,
                         const StepTables& tables) {
  const SampleJob& job = request.job;
  const int count = count_steps(job.steps);
  std::size_t row = 0;  // the next one of the table
  const auto launch = [&](int index) {
    launch_step(request, row, index, at, tables);
    if (index + 1 == count) launch_decode(request, at);
  };

  if (!job.on_step) {
    for (int i = 0; i < count; ++i) launch(i);
    return true;
  }
  launch(0);
  float sigma = job.steps.front().sigma;
  std::size_t reported = 0;  // rows of the steps that the callback was called for
  for (int i = 0; i < count; ++i) {
    // One step ahead, so that the device does not wait for the callback.
    if (i + 1 < count) launch(i + 1);
    ZRT_CUDA(cudaEventSynchronize(step_done_[i % 2].get()));
    while (job.steps[reported].ends == 0.0f) ++reported;
    const float sigma_next = job.steps[reported++].sigma_next;
    const auto read_latents = [&](float* target) {
      const DeviceGuard guard(options_.device);
      ZRT_CUDA(cudaMemcpyAsync(target, tables.snapshots[i % 2], sizeof(float) * job.shape.size(),
                               cudaMemcpyDeviceToHost, side_stream_.get()));
      side_stream_.synchronize();
    };
    if (!job.on_step({.index = i,
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

void Pipeline::read_result(const Request& request, const SampleBuffers& at) {
  const SampleJob& job = request.job;
  const std::size_t values = job.shape.size();
  if (request.pixels != nullptr)
    read_back(request.pixels, at.pixels,
              job.shape.batch * 3 * job.shape.area() * area(need(vae_decoders_, request.decoder)),
              stream_);
  read_back(job.latents, at.latents, sizeof(float) * values, stream_);
  // If the latents are not finite the transformer is at fault, and the caller finds that in them.
  if (request.pixels != nullptr && read_flag(at.not_finite, stream_) &&
      std::all_of(job.latents, job.latents + values, [](float x) { return std::isfinite(x); }))
    throw NotFiniteError(request.decoder);
}

bool Pipeline::sample(const SampleJob& job, const Conditioning& conditioning,
                      const std::string& decoder, std::uint8_t* pixels, SampleTimes& times) {
  const PipelineLock lock(mutex_, options_.device);
  const int channels = need(transformer_, "transformer").config().in_channels;
  if (job.shape.channels != channels)
    throw std::invalid_argument("latents: expected " + std::to_string(channels) +
                                " channels, got " + std::to_string(job.shape.channels));
  if (pixels != nullptr) need(vae_decoders_, decoder);
  if (conditioning.control) need(controlnet_, "controlnet");
  if (job.steps.empty() || job.steps.back().ends == 0.0f)
    throw std::invalid_argument("steps: expected a last row that ends a step of the schedule");
  const Request request{.job = job,
                        .conditioning = conditioning,
                        .shape = shape_of(job, conditioning),
                        .decoder = decoder,
                        .pixels = pixels};
  Arena size(nullptr);
  plan(request, size);
  Arena memory = arena(loop_memory_, size.used(), "the sampler loop");
  const SampleBuffers at = plan(request, memory);
  Arena table_size(nullptr);
  plan_tables(request, table_size);
  Arena table_memory = arena(table_memory_, table_size.used(), "the sampler loop's steps");
  const StepTables tables = plan_tables(request, table_memory);
  const ScopedFlag sampling(sampling_);
  const StreamDrain drain(stream_);
  graphs_.trim();
  make_room();
  load_inputs(request, at, tables);

  ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
  prepare(request, at, tables);
  if (!run_steps(request, at, tables)) return false;
  read_result(request, at);
  times.denoise = denoised_.since(started_) * 1e-3;
  times.decode = decoded_.since(denoised_) * 1e-3;
  gemm_.save_cache();
  return true;
}

}  // namespace zimage_rt
