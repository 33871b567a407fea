#include "zimage_rt/guidance.h"

#include <cmath>

namespace zimage_rt {
namespace {

double norm(const float* values, std::size_t count) {
  double sum = 0.0;
  for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
  return std::sqrt(sum);
}

}  // namespace

void apply_guidance(const Guidance& guidance, float* positive, const float* negative,
                    std::size_t count) {
  const double norm_before = guidance.normalization > 0.0f ? norm(positive, count) : 0.0;
  for (std::size_t i = 0; i < count; ++i)
    positive[i] = positive[i] + guidance.scale * (positive[i] - negative[i]);
  if (guidance.normalization <= 0.0f) return;
  const double limit = norm_before * guidance.normalization;
  const double norm_after = norm(positive, count);
  if (norm_after <= limit) return;
  const float factor = static_cast<float>(limit / norm_after);
  for (std::size_t i = 0; i < count; ++i) positive[i] *= factor;
}

}  // namespace zimage_rt
