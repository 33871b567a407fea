#pragma once

// numpy arrays on the device, for the bindings of single kernels: fp32, fp16, int8, and bf16 and
// float8 (e4m3) as the uint16 and uint8 of their bits, because numpy has neither.

#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"

namespace zimage_rt {

inline DType dtype_of(const pybind11::array& array) {
  const char kind = array.dtype().kind();
  const pybind11::ssize_t size = array.dtype().itemsize();
  if (kind == 'f' && size == 4) return DType::kFloat32;
  if (kind == 'f' && size == 2) return DType::kFloat16;
  if (kind == 'u' && size == 2) return DType::kBFloat16;
  if (kind == 'i' && size == 1) return DType::kInt8;
  if (kind == 'u' && size == 1) return DType::kFloat8;
  throw std::invalid_argument(
      "expected float32, float16, uint16 (bf16 bits), int8 or uint8 (float8 bits)");
}

inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "int8") return DType::kInt8;
  if (name == "float8") return DType::kFloat8;
  throw std::invalid_argument("expected float32, float16, bfloat16, int8 or float8, got " + name);
}

inline pybind11::dtype numpy_dtype(DType type) {
  switch (type) {
    case DType::kFloat32:
      return pybind11::dtype("f4");
    case DType::kFloat16:
      return pybind11::dtype("f2");
    case DType::kBFloat16:
      return pybind11::dtype("u2");
    case DType::kInt8:
      return pybind11::dtype("i1");
    case DType::kFloat8:
      break;
  }
  return pybind11::dtype("u1");
}

// A device copy of an array; `download` returns the memory in the same shape and type.
class DeviceArray {
 public:
  explicit DeviceArray(const pybind11::array& array)
      : shape_(array.shape(), array.shape() + array.ndim()),
        dtype_(dtype_of(array)),
        buffer_(static_cast<std::size_t>(array.nbytes()), "test array") {
    const auto dense = pybind11::array::ensure(array, pybind11::array::c_style);
    ZRT_CUDA(cudaMemcpy(buffer_.data(), dense.data(), buffer_.bytes(), cudaMemcpyHostToDevice));
  }
  // An output filled with 0xff bytes, NaN in every format but int8, to show what a kernel does not
  // write.
  DeviceArray(std::vector<pybind11::ssize_t> shape, DType dtype)
      : shape_(std::move(shape)), dtype_(dtype), buffer_(size(), "test array") {
    ZRT_CUDA(cudaMemset(buffer_.data(), 0xff, buffer_.bytes()));
  }

  template <typename T = void>
  T* data() const {
    return reinterpret_cast<T*>(buffer_.data());
  }
  DType dtype() const { return dtype_; }
  pybind11::ssize_t shape(std::size_t i) const { return shape_.at(i); }

  pybind11::array download() const {
    ZRT_CUDA(cudaDeviceSynchronize());
    pybind11::array out(numpy_dtype(dtype_), shape_);
    ZRT_CUDA(
        cudaMemcpy(out.mutable_data(), buffer_.data(), buffer_.bytes(), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  std::size_t size() const {
    std::size_t count = size_of(dtype_);
    for (const auto n : shape_) count *= static_cast<std::size_t>(n);
    return count;
  }
  std::vector<pybind11::ssize_t> shape_;
  DType dtype_;
  DeviceBuffer buffer_;
};

inline int rows_of(const DeviceArray& array) { return static_cast<int>(array.shape(0)); }
inline int columns_of(const DeviceArray& array) { return static_cast<int>(array.shape(1)); }

}  // namespace zimage_rt
