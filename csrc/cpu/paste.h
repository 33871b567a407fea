#pragma once

#include <cstddef>
#include <cstdint>

namespace zimage_rt {

// Blends a drawn image with the original, both RGB of `count` pixels. A mask of 0 keeps the
// original's bytes, 255 the drawn ones, and values in between mix both, rounded to nearest.
void paste(const std::uint8_t* drawn, const std::uint8_t* original, const std::uint8_t* mask,
           std::size_t count, std::uint8_t* out);

}  // namespace zimage_rt
