#pragma once

#include <cstddef>
#include <cstdint>

namespace zimage_rt {

// Fills `out` with the numbers torch.randn gives on the CPU for this seed, in float32.
//
// The generator is the 32-bit Mersenne Twister (Matsumoto and Nishimura 1998); torch turns its
// words into normals by Box-Muller, sixteen at a time, and one by one in double precision when
// fewer than sixteen are asked for. The words are torch's to the bit. log, sin and cos come from
// this machine's C library, while torch picks a vector library by the CPU it runs on, so values may
// differ in the last place, as they do between CPUs in torch.
void randn(std::uint64_t seed, float* out, std::size_t count);

}  // namespace zimage_rt
