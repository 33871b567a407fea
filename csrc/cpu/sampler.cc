#include "cpu/sampler.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace zimage_rt {
namespace {

// `kept` is [slots, total]; the sum's order is the CUDA kernel's, too.
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

// Slots that a table writes or reads.
std::size_t count_slots(const std::vector<SamplerStep>& steps) {
  std::size_t count = 0;
  for (const SamplerStep& step : steps) {
    if (step.keeps()) count = std::max(count, static_cast<std::size_t>(step.slot) + 1);
    for (std::size_t k = 0; k < SamplerStep::kHistory; ++k)
      if (step.history[k] != 0.0f) count = std::max(count, k + 1);
  }
  return count;
}

void blend(const Inpaint& inpaint, float sigma, float* latents, std::size_t batch,
           std::size_t sample_size) {
  for (std::size_t j = 0; j < batch * sample_size; ++j) {
    const float mask = inpaint.mask[j / sample_size * inpaint.area + j % inpaint.area];
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

bool sample(Denoiser& denoiser, const std::vector<SamplerStep>& steps, const Guidance& guidance,
            float* latents, std::size_t batch, std::size_t sample_size, const float* step_noise,
            const Inpaint* inpaint, const StepCallback& callback) {
  const std::size_t total = batch * sample_size;
  std::vector<float> noise_pred(guidance.ever() ? 2 * total : total);
  std::vector<float> kept(count_slots(steps) * total);
  const int count = count_steps(steps);
  int index = 0;
  float sigma_before = steps.empty() ? 0.0f : steps.front().sigma;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const SamplerStep& step = steps[i];
    const bool guided = guidance.active(i, batch);
    denoiser.predict(latents, 1.0f - step.sigma, guided, noise_pred.data());
    if (guided) {
      for (std::size_t b = 0; b < batch; ++b) {
        float* positive = noise_pred.data() + b * sample_size;
        apply_guidance(guidance.scales[i * batch + b], guidance.normalization, positive,
                       positive + total, sample_size);
      }
    }
    update(step, latents, noise_pred.data(), kept.data(), step_noise, total);
    if (step.noise != 0.0f) step_noise += total;
    if (step.ends == 0.0f) continue;
    if (inpaint != nullptr) blend(*inpaint, step.sigma_next, latents, batch, sample_size);
    if (callback && !callback({.index = index,
                               .count = count,
                               .sigma = sigma_before,
                               .sigma_next = step.sigma_next,
                               .latents = latents}))
      return false;
    sigma_before = step.sigma_next;
    ++index;
  }
  return true;
}

}  // namespace zimage_rt
