#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/fused_gemm.h"
#include "ops/cublaslt_gemm.h"

namespace zimage_rt {

// Shared by the bindings of matrix products: cuBLASLt, opened once, and the workspaces of fused
// products and of 8-bit ones.
CublasLtGemm& library_gemm(const std::string& library);
void* fused_workspace();
void* split_workspace();
// "any", "2x1" or "1x2".
ClusterShape cluster_named(const std::string& name);

// Each adds one family of kernels to a module. Arguments are numpy arrays, copied to the device and
// back.
void bind_elementwise(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_quantized(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_conv(pybind11::module_& m);
void bind_vae(pybind11::module_& m);

}  // namespace zimage_rt
