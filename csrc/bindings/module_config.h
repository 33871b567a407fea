#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "runtime/pipeline.h"

namespace zimage_rt {

// A module's config in the manifest. Throws WeightError for a missing key or a wrong type,
// std::invalid_argument for an unknown module.
ModuleConfig module_config(const std::string& module, const pybind11::dict& config);

}  // namespace zimage_rt
