#include "zimage_rt/schedule.h"

#include <cstddef>
#include <stdexcept>
#include <vector>

namespace zimage_rt {

std::vector<float> flow_match_sigmas(int num_inference_steps, double shift) {
  if (num_inference_steps < 1)
    throw std::invalid_argument("num_inference_steps must be at least 1");
  if (!(shift > 0.0)) throw std::invalid_argument("shift must be positive");
  std::vector<float> sigmas;
  sigmas.reserve(static_cast<std::size_t>(num_inference_steps) + 1);
  const double n = num_inference_steps;
  const float factor = static_cast<float>(shift);
  for (int i = 0; i < num_inference_steps; ++i) {
    const float sigma = static_cast<float>((n - i) / n);  // linspace(1, 1/n, n)
    sigmas.push_back(factor * sigma / (1.0f + static_cast<float>(shift - 1.0) * sigma));
  }
  sigmas.push_back(0.0f);
  return sigmas;
}

}  // namespace zimage_rt
