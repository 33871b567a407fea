#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "zimage_rt/guidance.h"

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

// Flow-match Euler: latents += (sigma_next - sigma) * noise_pred for each pair of `sigmas`, in
// place, fp32. Returns false if the callback stopped it; `latents` are then those after the last
// whole step.
bool sample_euler(Denoiser& denoiser, const std::vector<float>& sigmas, const Guidance& guidance,
                  float* latents, std::size_t batch, std::size_t sample_size,
                  const StepCallback& callback);

}  // namespace zimage_rt
