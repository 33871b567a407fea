#pragma once

#include <cstddef>
#include <vector>

namespace zimage_rt {

// Classifier-free guidance as diffusers' ZImagePipeline has it, with a scale for each evaluation
// and sample. zimage_rt/sampling/guidance.py makes the scales and is the reference of the formulas.
struct Guidance {
  std::vector<float> scales;   // [evaluations, batch]; 0: no guidance
  float normalization = 0.0f;  // > 0: the guided prediction's norm is at most this times the
                               // positive one's

  // Whether any sample is guided at an evaluation: without, the model sees no negative prompt.
  bool active(std::size_t evaluation, std::size_t batch) const;
  // Whether any evaluation is.
  bool ever() const;
};

// positive += scale * (positive - negative), in place, for one sample of `count` values. Nothing
// where the scale is 0.
void apply_guidance(float scale, float normalization, float* positive, const float* negative,
                    std::size_t count);

}  // namespace zimage_rt
