#pragma once

#include <cstddef>

namespace zimage_rt {

// Allocates from one block of memory. Over a null base it only counts bytes, so that the same
// function measures a layout and makes it.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  template <typename T = std::byte>
  T* take(std::size_t count) {
    std::byte* const memory = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(memory);
  }
  std::size_t used() const { return used_; }

 private:
  static constexpr std::size_t kAlignment = 256;
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace zimage_rt
