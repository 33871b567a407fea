#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/sampler.h"

namespace zimage_rt {

// A table of zimage_rt/sampling/samplers.py: float32 [evaluations, 12], the columns of SamplerStep
// in order.
inline std::vector<SamplerStep> sampler_steps(
    const pybind11::array_t<float, pybind11::array::c_style>& rows) {
  constexpr pybind11::ssize_t columns = 12;
  static_assert(sizeof(SamplerStep) == columns * sizeof(float));
  if (rows.ndim() != 2 || rows.shape(0) < 1 || rows.shape(1) != columns)
    throw std::invalid_argument("steps: expected [evaluations, 12], one evaluation or more");
  const auto* first = reinterpret_cast<const SamplerStep*>(rows.data());
  std::vector<SamplerStep> steps(first, first + rows.shape(0));
  for (const SamplerStep& step : steps)
    if (!(step.slot >= 0.0f && step.slot < SamplerStep::kHistory))
      throw std::invalid_argument("steps: expected a slot of 0 to 2");
  return steps;
}

// The noise of the rows that take some: float32 [draws, *latents' shape], or null without any.
inline const float* step_noise_of(
    const std::optional<pybind11::array_t<float, pybind11::array::c_style>>& noise,
    const std::vector<SamplerStep>& steps, pybind11::ssize_t latent_values) {
  const auto wanted = static_cast<pybind11::ssize_t>(count_draws(steps));
  if (wanted == 0) return nullptr;
  if (!noise || noise->ndim() < 1 || noise->shape(0) != wanted ||
      noise->size() != wanted * latent_values)
    throw std::invalid_argument(
        "step_noise: expected an array like the latents for each row of the table that takes "
        "noise");
  return noise->data();
}

// A scale for each row of the table and each sample: float32 [evaluations, batch].
inline Guidance guidance_of(const pybind11::array_t<float, pybind11::array::c_style>& scales,
                            float normalization, std::size_t evaluations, pybind11::ssize_t batch) {
  if (scales.ndim() != 2 || scales.shape(0) != static_cast<pybind11::ssize_t>(evaluations) ||
      scales.shape(1) != batch)
    throw std::invalid_argument("guidance_scales: expected [evaluations, batch]");
  return {.scales = {scales.data(), scales.data() + scales.size()}, .normalization = normalization};
}

}  // namespace zimage_rt
