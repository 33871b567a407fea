#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <vector>

#include "cpu/guidance.h"

namespace zimage_rt {

// The transformer as the loop on the host calls it. One call is one function evaluation.
class Denoiser {
 public:
  virtual ~Denoiser() = default;

  // Predicts for every sample of `latents` [batch, sample_size] at `timestep` = 1 - sigma, with the
  // sign already flipped. With `guided` false, writes `noise_pred` [batch, sample_size] from the
  // positive contexts. With `guided` true, writes [2 * batch, sample_size]: the positive
  // predictions, then the negative ones, of the same latents.
  virtual void predict(const float* latents, float timestep, bool guided, float* noise_pred) = 0;
};

// One function evaluation at `sigma` and the linear update after it, over kHistory kept arrays and
// the next noise:
//   latents = x * latents + pred * noise_pred + sum_k history[k] * kept[k] + noise * step_noise
//   kept[slot] = keep_x * latents + keep_pred * noise_pred      (latents before the update)
// Every sampler of zimage_rt/sampling/samplers.py is a table of these, so that there is one loop.
// Euler is x = 1, pred = sigma_next - sigma, and nothing kept. Rows with noise take the arrays of
// step noise in their order.
struct SamplerStep {
  static constexpr int kHistory = 3;

  float sigma;
  float sigma_next;  // of the latents after the update
  float x;
  float pred;
  float history[kHistory];
  float noise;
  float keep_x;
  float keep_pred;
  float slot;  // the index of the kept array to write: a small integer
  float ends;  // 1 if a step of the schedule is complete, 0 inside one (Heun's first half)

  bool keeps() const { return keep_x != 0.0f || keep_pred != 0.0f; }
};

// Inpainting: after every step of the schedule the latents are blended with those of an image,
//   latents = (1 - mask) * ((1 - sigma_next) * image + sigma_next * noise) + mask * latents,
// as in diffusers' ZImageInpaintPipeline.
struct Inpaint {
  const float* mask;   // [batch, 1, height, width]: 1 to draw, 0 to keep
  const float* image;  // [batch, channels, height, width]: the latents of the image
  const float* noise;  // like image
};

// The state of the loop after a step of the schedule.
struct Step {
  int index;  // from 0
  int count;
  float sigma;       // before the step
  float sigma_next;  // after it
  // Copies the latents after this step to host memory. From any thread, until the callback returns.
  std::function<void(float* target)> read_latents;
};

// Returns false to stop the loop.
using StepCallback = std::function<bool(const Step&)>;

// Sizes of latents [batch, channels, height, width].
struct LatentShape {
  int batch;
  int channels;
  int height;
  int width;

  std::size_t area() const { return static_cast<std::size_t>(height) * width; }
  std::size_t sample_size() const { return channels * area(); }
  std::size_t size() const { return batch * sample_size(); }
};

// One request to a sampler loop, on the host or on a device. Host memory.
struct SampleJob {
  float* latents;  // of `shape`, in and out
  LatentShape shape;
  std::vector<SamplerStep> steps;     // a table of zimage_rt/sampling/samplers.py
  Guidance guidance;                  // a scale for each row of the table and each sample
  const float* step_noise = nullptr;  // [count_draws(steps), *latents]; null if that is 0
  std::optional<Inpaint> inpaint = {};
  StepCallback on_step = {};  // may be empty
};

// The number of steps of the schedule in a table.
int count_steps(const std::vector<SamplerStep>& steps);

// The number of rows of a table that take noise: among the first `rows`, or among all.
std::size_t count_draws(const std::vector<SamplerStep>& steps, std::size_t rows);
inline std::size_t count_draws(const std::vector<SamplerStep>& steps) {
  return count_draws(steps, steps.size());
}

// Runs the loop on the host, in fp32. Returns false if the callback stopped it; the latents are
// then those after the last complete step.
bool sample(Denoiser& denoiser, const SampleJob& job);

}  // namespace zimage_rt
