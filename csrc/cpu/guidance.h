#pragma once

#include <cstddef>
#include <vector>

namespace zimage_rt {

// Classifier-free guidance as in diffusers' ZImagePipeline, with a scale for each evaluation and
// sample. zimage_rt/sampling/guidance.py computes the scales and is the reference of the formulas.
struct Guidance {
  std::vector<float> scales;   // [evaluations, batch]; 0: no guidance
  float normalization = 0.0f;  // > 0: the guided prediction's norm is at most this times the
                               // positive one's

  // Whether any sample is guided at an evaluation; if not, the model reads no negative prompt.
  bool active(std::size_t evaluation, std::size_t batch) const;
  // Whether any evaluation is guided.
  bool ever() const;
};

// positive += scale * (positive - negative), in place, for one sample of `count` values. A scale of
// 0 changes nothing.
void apply_guidance(float scale, float normalization, float* positive, const float* negative,
                    std::size_t count);

}  // namespace zimage_rt
