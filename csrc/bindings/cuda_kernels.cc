// _cuda_kernels: single kernels over numpy arrays, for tests. Not part of a release.

#include <pybind11/pybind11.h>

#include "bindings/kernels.h"

PYBIND11_MODULE(_cuda_kernels, m) {
  m.doc() = "Single kernels of zimage_rt's CUDA backend over numpy arrays, for tests.";
  zimage_rt::bind_elementwise(m);
  zimage_rt::bind_gemm(m);
  zimage_rt::bind_quantized(m);
  zimage_rt::bind_attention(m);
  zimage_rt::bind_conv(m);
  zimage_rt::bind_vae(m);
}
