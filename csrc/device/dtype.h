#pragma once

#include <cstddef>

namespace zimage_rt {

// Number formats of tensors on the device.
enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr std::size_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

}  // namespace zimage_rt
