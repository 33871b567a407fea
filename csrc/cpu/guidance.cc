#include "cpu/guidance.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace zimage_rt {
namespace {

double norm(const float* values, std::size_t count) {
  double sum = 0.0;
  for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
  return std::sqrt(sum);
}

}  // namespace

bool Guidance::active(std::size_t evaluation, std::size_t batch) const {
  const auto first = scales.begin() + static_cast<std::ptrdiff_t>(evaluation * batch);
  return std::any_of(first, first + static_cast<std::ptrdiff_t>(batch),
                     [](float scale) { return scale > 0.0f; });
}

bool Guidance::ever() const {
  return std::any_of(scales.begin(), scales.end(), [](float scale) { return scale > 0.0f; });
}

void apply_guidance(float scale, float normalization, float* positive, const float* negative,
                    std::size_t count) {
  if (scale <= 0.0f) return;
  const double norm_before = normalization > 0.0f ? norm(positive, count) : 0.0;
  for (std::size_t i = 0; i < count; ++i)
    positive[i] = positive[i] + scale * (positive[i] - negative[i]);
  if (normalization <= 0.0f) return;
  const double limit = norm_before * normalization;
  const double norm_after = norm(positive, count);
  if (norm_after <= limit) return;
  const float factor = static_cast<float>(limit / norm_after);
  for (std::size_t i = 0; i < count; ++i) positive[i] *= factor;
}

}  // namespace zimage_rt
