// The sampler loop of a pipeline: as it goes, with a callback after each step, or as one CUDA
// graph.

#include <algorithm>

#include "programs/pipeline_detail.h"

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

bool guided_at(const SampleJob& job, int i) {
  return job.guidance.active(static_cast<std::size_t>(i), job.contexts.size());
}

}  // namespace

Pipeline::SampleBuffers Pipeline::plan(const SampleShape& shape, const SampleJob& job,
                                       Arena& memory) const {
  const PatchGrid grid = transformer_->grid(shape);
  const auto batch = static_cast<std::size_t>(shape.latent_samples);
  SampleBuffers at{};
  at.latents = memory.take<float>(batch * grid.values());
  at.kept = memory.take<float>(SamplerStep::kHistory * batch * grid.values());
  at.step_noise = memory.take<float>(count_draws(job.steps) * batch * grid.values());
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
  if (job.control.latents != nullptr) at.control = controlnet_->plan(shape, memory);
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
  if (job.step_noise != nullptr)
    upload_to(at.step_noise, job.step_noise, count_draws(job.steps) * batch * grid.values(),
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

// What every evaluation needs and no latents change.
void Pipeline::prepare(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at) {
  transformer_->prepare(shape, at.transformer, ops());
  if (job.control.latents != nullptr)
    controlnet_->prepare(shape, at.transformer, at.control, ops());
}

// One evaluation and the update behind it, on the device alone.
void Pipeline::step(const SampleShape& shape, const SampleJob& job, int i,
                    const SampleBuffers& at) {
  const bool guided = guided_at(job, i);
  const int samples = guided ? 2 * shape.latent_samples : shape.latent_samples;
  const Ops run = ops();
  const Transformer::Evaluation evaluation{shape, samples, i, at.transformer, run};
  if (job.control.latents != nullptr)
    controlnet_->evaluate(evaluation, at.latents, at.control);
  else
    transformer_->evaluate(evaluation, at.latents);
  const PatchGrid grid = transformer_->grid(shape);
  const std::size_t drawn = count_draws(job.steps, static_cast<std::size_t>(i));
  const float* const step_noise =
      at.step_noise + drawn * static_cast<std::size_t>(shape.latent_samples) * grid.values();
  sampler_update({at.transformer.predicted, grid, at.latents, at.kept, shape.latent_samples, guided,
                  job.guidance.normalization > 0.0f, at.steps, i, at.scales, at.normalization,
                  at.factors, step_noise, at.mask, at.image, at.noise},
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
  prepare(shape, job, at);
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
  prepare(shape, job, at);
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
  if (job.control.latents != nullptr) need(controlnet_, "controlnet");
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
                            job.mask != nullptr,   job.control.latents != nullptr};
    for (int i = 0; i < shape.steps; ++i) {
      key.push_back(guided_at(job, i));
      key.push_back(job.steps[static_cast<std::size_t>(i)].noise != 0.0f);
    }
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

}  // namespace zimage_rt
