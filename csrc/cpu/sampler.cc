#include "cpu/sampler.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/guidance.h"

namespace zimage_rt {
namespace {

// `kept` is [slots, total]. The order of the sum is that of kernels/sampler_update.cu.
void update(const SamplerStep& step, float* latents, const float* noise_pred, float* kept,
            const float* noise, std::size_t total) {
  for (std::size_t j = 0; j < total; ++j) {
    const float before = latents[j];
    float after = step.x * before + step.pred * noise_pred[j];
    for (std::size_t k = 0; k < SamplerStep::kHistory; ++k)
      if (step.history[k] != 0.0f) after += step.history[k] * kept[k * total + j];
    if (step.noise != 0.0f) after += step.noise * noise[j];
    if (step.keeps())
      kept[static_cast<std::size_t>(step.slot) * total + j] =
          step.keep_x * before + step.keep_pred * noise_pred[j];
    latents[j] = after;
  }
}

// The number of slots that a table writes or reads.
std::size_t count_slots(const std::vector<SamplerStep>& steps) {
  std::size_t count = 0;
  for (const SamplerStep& step : steps) {
    if (step.keeps()) count = std::max(count, static_cast<std::size_t>(step.slot) + 1);
    for (std::size_t k = 0; k < SamplerStep::kHistory; ++k)
      if (step.history[k] != 0.0f) count = std::max(count, k + 1);
  }
  return count;
}

void blend(const Inpaint& inpaint, float sigma, float* latents, const LatentShape& shape) {
  const std::size_t area = shape.area(), sample_size = shape.sample_size();
  for (std::size_t j = 0; j < shape.size(); ++j) {
    const float mask = inpaint.mask[j / sample_size * area + j % area];
    const float image = sigma * inpaint.noise[j] + (1.0f - sigma) * inpaint.image[j];
    latents[j] = (1.0f - mask) * image + mask * latents[j];
  }
}

}  // namespace

int count_steps(const std::vector<SamplerStep>& steps) {
  return static_cast<int>(std::count_if(steps.begin(), steps.end(),
                                        [](const SamplerStep& step) { return step.ends != 0.0f; }));
}

std::size_t count_draws(const std::vector<SamplerStep>& steps, std::size_t rows) {
  const auto last = steps.begin() + static_cast<std::ptrdiff_t>(rows);
  return static_cast<std::size_t>(std::count_if(
      steps.begin(), last, [](const SamplerStep& step) { return step.noise != 0.0f; }));
}

bool sample(Denoiser& denoiser, const SampleJob& job) {
  const std::size_t total = job.shape.size(), sample_size = job.shape.sample_size();
  const auto batch = static_cast<std::size_t>(job.shape.batch);
  std::vector<float> noise_pred(job.guidance.ever() ? 2 * total : total);
  std::vector<float> kept(count_slots(job.steps) * total);
  const auto read_latents = [&](float* target) { std::copy_n(job.latents, total, target); };
  const int count = count_steps(job.steps);
  const float* step_noise = job.step_noise;
  int index = 0;
  float sigma_before = job.steps.empty() ? 0.0f : job.steps.front().sigma;
  for (std::size_t i = 0; i < job.steps.size(); ++i) {
    const SamplerStep& step = job.steps[i];
    const bool guided = job.guidance.active(i, batch);
    denoiser.predict(job.latents, 1.0f - step.sigma, guided, noise_pred.data());
    if (guided) {
      for (std::size_t b = 0; b < batch; ++b) {
        float* positive = noise_pred.data() + b * sample_size;
        apply_guidance(job.guidance.scales[i * batch + b], job.guidance.normalization, positive,
                       positive + total, sample_size);
      }
    }
    update(step, job.latents, noise_pred.data(), kept.data(), step_noise, total);
    if (step.noise != 0.0f) step_noise += total;
    if (step.ends == 0.0f) continue;
    if (job.inpaint) blend(*job.inpaint, step.sigma_next, job.latents, job.shape);
    if (job.on_step && !job.on_step({.index = index,
                                     .count = count,
                                     .sigma = sigma_before,
                                     .sigma_next = step.sigma_next,
                                     .read_latents = read_latents}))
      return false;
    sigma_before = step.sigma_next;
    ++index;
  }
  return true;
}

}  // namespace zimage_rt
