#pragma once

#include <cuda_runtime_api.h>

#include "cpu/sampler.h"
#include "kernels/patchify.h"

namespace zimage_rt {

// The linear update after an evaluation (SamplerStep in cpu/sampler.h), on the patches of its
// prediction. If `guided`, and the scale of the sample is not 0:
//   pred = positive + scale * (positive - negative), the negative predictions in the second half,
// which `normalized` then scales down to at most *normalization times the norm of the positive one.
// The formulas and their order are those of cpu/sampler.cc and cpu/guidance.cc. The table and the
// settings of the guidance are device memory, so that a captured update serves any of them.
struct SamplerUpdate {
  const float* patches;
  PatchGrid grid;
  float* latents;
  float* kept;  // SamplerStep::kHistory arrays like the latents
  int samples;  // of the latents; the patches have twice as many if guided
  bool guided;
  bool normalized;
  const SamplerStep* steps;
  int step;
  const float* scales;  // of guidance, [steps, samples]
  const float* normalization;
  float* factors;           // [samples], scratch for normalization
  const float* step_noise;  // like latents; read if the step takes noise
  // Inpainting: mask [samples, 1, height, width]; all three null without.
  const float* mask;
  const float* image;
  const float* noise;
};
void sampler_update(const SamplerUpdate& args, cudaStream_t stream);

}  // namespace zimage_rt
