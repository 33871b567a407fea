#pragma once

#include <pybind11/numpy.h>

#include <stdexcept>
#include <vector>

#include "zimage_rt/sampler.h"

namespace zimage_rt {

// A table of zimage_rt/samplers.py: float32 [evaluations, 8], the columns of SamplerStep in order.
inline std::vector<SamplerStep> sampler_steps(
    const pybind11::array_t<float, pybind11::array::c_style>& rows) {
  static_assert(sizeof(SamplerStep) == 8 * sizeof(float));
  if (rows.ndim() != 2 || rows.shape(0) < 1 || rows.shape(1) != 8)
    throw std::invalid_argument("steps: expected [evaluations, 8], one evaluation or more");
  const auto* first = reinterpret_cast<const SamplerStep*>(rows.data());
  return {first, first + rows.shape(0)};
}

}  // namespace zimage_rt
