#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

namespace zimage_rt {

// Successive torch.randn calls on one CPU generator, in float32.
//
// The generator is the 32-bit Mersenne Twister (Matsumoto and Nishimura 1998); torch turns its
// words into normals by Box-Muller, sixteen at a time, and one by one in double precision when
// fewer than sixteen are asked for. The words are torch's to the bit. log, sin and cos come from
// this machine's C library, while torch picks a vector library by the CPU it runs on, so values may
// differ in the last place, as they do between CPUs in torch. A draw of fewer than sixteen must be
// the only one: torch keeps half a pair for the next, which this does not.
class NormalStream {
 public:
  // torch keeps 64 bits of seed but gives the twister the low 32.
  explicit NormalStream(std::uint64_t seed) : engine_(static_cast<std::uint32_t>(seed)) {}
  void draw(float* out, std::size_t count);

 private:
  std::mt19937 engine_;
};

// Fills `out` with the numbers torch.randn gives on the CPU for this seed.
void randn(std::uint64_t seed, float* out, std::size_t count);

}  // namespace zimage_rt
