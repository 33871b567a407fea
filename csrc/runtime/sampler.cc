#include "zimage_rt/sampler.h"

namespace zimage_rt {

bool sample_euler(Denoiser& denoiser, const std::vector<float>& sigmas, const Guidance& guidance,
                  float* latents, std::size_t batch, std::size_t sample_size,
                  const StepCallback& callback) {
  const std::size_t total = batch * sample_size;
  std::vector<float> noise_pred(guidance.scale > 0.0f ? 2 * total : total);
  const int count = static_cast<int>(sigmas.size()) - 1;
  for (int i = 0; i < count; ++i) {
    const float sigma = sigmas[static_cast<std::size_t>(i)];
    const float sigma_next = sigmas[static_cast<std::size_t>(i) + 1];
    const float timestep = 1.0f - sigma;
    const bool guided = guidance.active(timestep);
    denoiser.predict(latents, timestep, guided, noise_pred.data());
    if (guided) {
      for (std::size_t b = 0; b < batch; ++b) {
        float* positive = noise_pred.data() + b * sample_size;
        apply_guidance(guidance, positive, positive + total, sample_size);
      }
    }
    const float delta = sigma_next - sigma;
    for (std::size_t j = 0; j < total; ++j) latents[j] += delta * noise_pred[j];
    if (callback && !callback({i, count, sigma, sigma_next, latents})) return false;
  }
  return true;
}

}  // namespace zimage_rt
