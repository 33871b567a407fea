#include "cpu/paste.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace zimage_rt {

void paste(const std::uint8_t* drawn, const std::uint8_t* original, const std::uint8_t* mask,
           std::size_t count, std::uint8_t* out) {
  constexpr std::size_t kChannels = 3;
  for (std::size_t begin = 0, end = 0; begin < count; begin = end) {
    // Masks are constant over long runs, which are copied at once.
    const std::uint8_t weight = mask[begin];
    end = begin + 1;
    while (end < count && mask[end] == weight) ++end;
    const std::size_t first = begin * kChannels, last = end * kChannels;
    if (weight == 0 || weight == 255) {
      std::memcpy(out + first, (weight == 0 ? original : drawn) + first, last - first);
      continue;
    }
    for (std::size_t i = first; i < last; ++i)
      out[i] =
          static_cast<std::uint8_t>((drawn[i] * weight + original[i] * (255 - weight) + 127) / 255);
  }
}

}  // namespace zimage_rt
