#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/sampler.h"

namespace zimage_rt {

using FloatArray = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;

std::vector<pybind11::ssize_t> shape_of(const pybind11::array& array);

// An attribute as a C-contiguous float32 array, converted if it is none. Throws
// std::invalid_argument naming the attribute.
FloatArray float_attribute(pybind11::handle owner, const char* name);

// A SampleJob of zimage_rt/backends/base.py. `arrays` own the memory that `job` points to.
struct JobReader {
  SampleJob job;
  std::vector<pybind11::array> arrays;
};

// Reads all attributes but the conditioning. The latents change in place. Throws
// std::invalid_argument, or TypeError if the latents are no float32 array.
JobReader read_job(pybind11::handle object);

}  // namespace zimage_rt
