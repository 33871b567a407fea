#pragma once

#include <cstddef>

namespace zimage_rt {

// Number formats of tensors on the device. kFloat8 is e4m3, without infinities.
enum class DType { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8 };

// Whether a format's numbers need a scale per row.
constexpr bool is_8bit(DType type) { return type == DType::kInt8 || type == DType::kFloat8; }

// For messages.
constexpr const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat32:
      return "fp32";
    case DType::kFloat16:
      return "fp16";
    case DType::kBFloat16:
      return "bf16";
    case DType::kInt8:
      return "int8";
    case DType::kFloat8:
      return "float8";
  }
  return "an unknown format";
}

constexpr std::size_t size_of(DType type) {
  return type == DType::kFloat32 ? 4 : is_8bit(type) ? 1 : 2;
}

}  // namespace zimage_rt
