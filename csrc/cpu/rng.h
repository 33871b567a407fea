#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

namespace zimage_rt {

// Successive torch.randn calls on one CPU generator, in float32.
//
// The generator is the 32-bit Mersenne Twister (Matsumoto and Nishimura 1998). torch makes normals
// of its words by Box-Muller: sixteen at a time, or one by one in double precision in draws of
// fewer than sixteen. The words equal torch's to the bit. log, sin and cos are those of this
// machine's C library, while torch chooses a vector library by the CPU, so values may differ in the
// last place, as they do between CPUs in torch. A draw of fewer than sixteen must be the only one:
// torch keeps half a pair for the next draw, which this does not.
class NormalStream {
 public:
  // torch stores 64 bits of seed and seeds the twister with the low 32.
  explicit NormalStream(std::uint64_t seed) : engine_(static_cast<std::uint32_t>(seed)) {}
  void draw(float* out, std::size_t count);

 private:
  std::mt19937 engine_;
};

// Fills `out` with the numbers of torch.randn on the CPU for this seed.
void randn(std::uint64_t seed, float* out, std::size_t count);

}  // namespace zimage_rt
