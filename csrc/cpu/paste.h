#pragma once

#include <cstddef>
#include <cstdint>

namespace zimage_rt {

// Lays a drawn picture over the original, both RGB of `count` pixels: where the mask is 0 the
// original's bytes stay as they are, where it is 255 the drawn ones, and between them both are
// mixed and rounded to the nearest.
void paste(const std::uint8_t* drawn, const std::uint8_t* original, const std::uint8_t* mask,
           std::size_t count, std::uint8_t* out);

}  // namespace zimage_rt
