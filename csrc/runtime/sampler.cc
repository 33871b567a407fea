#include "zimage_rt/sampler.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace zimage_rt {
namespace {

void update(const SamplerStep& step, float* latents, const float* noise_pred, float* kept,
            std::size_t total) {
  for (std::size_t j = 0; j < total; ++j) {
    const float before = latents[j];
    float after = step.x * before + step.pred * noise_pred[j];
    if (step.history != 0.0f) after += step.history * kept[j];
    if (step.keeps()) kept[j] = step.keep_x * before + step.keep_pred * noise_pred[j];
    latents[j] = after;
  }
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

bool sample(Denoiser& denoiser, const std::vector<SamplerStep>& steps, const Guidance& guidance,
            float* latents, std::size_t batch, std::size_t sample_size, const Inpaint* inpaint,
            const StepCallback& callback) {
  const std::size_t total = batch * sample_size;
  std::vector<float> noise_pred(guidance.ever() ? 2 * total : total);
  const bool history =
      std::any_of(steps.begin(), steps.end(), [](const auto& step) { return step.keeps(); });
  std::vector<float> kept(history ? total : 0);
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
    update(step, latents, noise_pred.data(), kept.data(), total);
    if (step.ends == 0.0f) continue;
    if (inpaint != nullptr) blend(*inpaint, step.sigma_next, latents, batch, sample_size);
    if (callback && !callback({index, count, sigma_before, step.sigma_next, latents})) return false;
    sigma_before = step.sigma_next;
    ++index;
  }
  return true;
}

}  // namespace zimage_rt
