#pragma once

#include <cstddef>

namespace zimage_rt {

// Classifier-free guidance as diffusers' ZImagePipeline has it. zimage_rt/guidance.py is the
// reference.
struct Guidance {
  float scale = 0.0f;       // 0: none; the model then sees no negative prompt at all
  float truncation = 1.0f;  // guidance is off where timestep = 1 - sigma exceeds this
  float normalization =
      0.0f;  // > 0: the guided prediction's norm is at most this times the positive one's

  bool active(float timestep) const {
    return scale > 0.0f && !(truncation <= 1.0f && timestep > truncation);
  }
};

// positive += scale * (positive - negative), in place, one sample of `count` values at a time.
void apply_guidance(const Guidance& guidance, float* positive, const float* negative,
                    std::size_t count);

}  // namespace zimage_rt
