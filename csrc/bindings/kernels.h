#pragma once

#include <pybind11/pybind11.h>

namespace zimage_rt {

// Each adds one family of kernels to a module. Arguments are numpy arrays, copied to the device and
// back.
void bind_elementwise(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_conv(pybind11::module_& m);

}  // namespace zimage_rt
