#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "cpu/guidance.h"

namespace zimage_rt {

// The transformer as the loop sees it. One call is one function evaluation.
class Denoiser {
 public:
  virtual ~Denoiser() = default;

  // Predicts for every sample of `latents` [batch, sample_size] at `timestep` = 1 - sigma, sign
  // already flipped. With `guided` false, writes `noise_pred` [batch, sample_size] from the
  // positive contexts. With `guided` true, writes [2 * batch, sample_size]: the positive
  // predictions, then the negative ones, of the same latents.
  virtual void predict(const float* latents, float timestep, bool guided, float* noise_pred) = 0;
};

// One function evaluation at `sigma` and the linear update behind it, over kHistory kept arrays and
// the next noise:
//   latents = x * latents + pred * noise_pred + sum_k history[k] * kept[k] + noise * drawn
//   kept[slot] = keep_x * latents + keep_pred * noise_pred      (of the latents before the update)
// Every sampler of zimage_rt/sampling/samplers.py is a table of these, so that there is one loop.
// Euler is x = 1, pred = sigma_next - sigma, and nothing kept. Rows with noise take the drawn
// arrays in their order.
struct SamplerStep {
  static constexpr int kHistory = 3;

  float sigma;
  float sigma_next;  // where the latents are afterwards
  float x;
  float pred;
  float history[kHistory];
  float noise;
  float keep_x;
  float keep_pred;
  float slot;  // which of the kept arrays is written: a small whole number
  float ends;  // 1 where a step of the schedule is complete, 0 inside one (Heun's first half)

  bool keeps() const { return keep_x != 0.0f || keep_pred != 0.0f; }
};

// Where a picture is kept: after every step of the schedule the latents are blended,
//   latents = (1 - mask) * ((1 - sigma_next) * image + sigma_next * noise) + mask * latents,
// as diffusers' ZImageInpaintPipeline does.
struct Inpaint {
  const float* mask;   // [batch, 1, height, width]: 1 to draw, 0 to keep
  const float* image;  // [batch, channels, height, width]: the picture's latents
  const float* noise;  // like image
  std::size_t area;    // height * width
};

// What a callback is told after a step. `latents` may be read until the callback returns.
struct Step {
  int index;  // from 0
  int count;
  float sigma;       // before the step
  float sigma_next;  // after it
  const float* latents;
};

// Returns false to stop the loop.
using StepCallback = std::function<bool(const Step&)>;

// How many steps of the schedule a table has.
int count_steps(const std::vector<SamplerStep>& steps);

// How many rows of a table take noise: of the first `rows`, or of all.
std::size_t count_draws(const std::vector<SamplerStep>& steps, std::size_t rows);
inline std::size_t count_draws(const std::vector<SamplerStep>& steps) {
  return count_draws(steps, steps.size());
}

// Runs the table on `latents` [batch, sample_size], in place, fp32, with a guidance scale for each
// row and sample. `step_noise` is [count_draws(steps), batch, sample_size], null where that is 0;
// `inpaint` may be null. Returns false if the callback stopped it; `latents` are then those after
// the last whole step.
bool sample(Denoiser& denoiser, const std::vector<SamplerStep>& steps, const Guidance& guidance,
            float* latents, std::size_t batch, std::size_t sample_size, const float* step_noise,
            const Inpaint* inpaint, const StepCallback& callback);

}  // namespace zimage_rt
