#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
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

// A scale for each row of the table and each sample: float32 [evaluations, batch].
inline Guidance guidance_of(const pybind11::array_t<float, pybind11::array::c_style>& scales,
                            float normalization, std::size_t evaluations, pybind11::ssize_t batch) {
  if (scales.ndim() != 2 || scales.shape(0) != static_cast<pybind11::ssize_t>(evaluations) ||
      scales.shape(1) != batch)
    throw std::invalid_argument("guidance_scales: expected [evaluations, batch]");
  return {{scales.data(), scales.data() + scales.size()}, normalization};
}

}  // namespace zimage_rt
