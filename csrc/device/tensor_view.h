#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/dtype.h"

namespace zimage_rt {

// A dense, row-major tensor in memory that it does not own.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;

  std::size_t count() const {
    std::size_t n = 1;
    for (const std::int64_t size : shape) n *= static_cast<std::size_t>(size);
    return n;
  }
  std::size_t bytes() const { return count() * size_of(dtype); }
  const float* f32() const { return static_cast<const float*>(data); }
};

}  // namespace zimage_rt
