#include "cpu/rng.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>

namespace zimage_rt {
namespace {

constexpr double kTwoPi = 2.0 * 3.14159265358979323846;

// 24 random bits: every float32 in [0, 1) that torch's uniform returns.
float uniform_float(std::mt19937& engine) {
  return static_cast<float>(engine() & ((1u << 24) - 1)) * (1.0f / (1u << 24));
}

// 53 bits of two words, the high word first.
double uniform_double(std::mt19937& engine) {
  const std::uint64_t high = engine();
  const std::uint64_t low = engine();
  const std::uint64_t bits = ((high << 32) | low) & ((std::uint64_t{1} << 53) - 1);
  return static_cast<double>(bits) * (1.0 / static_cast<double>(std::uint64_t{1} << 53));
}

// Replaces sixteen uniforms by sixteen normals: the first eight are radii, the last eight angles.
void box_muller_16(float* block) {
  for (int i = 0; i < 8; ++i) {
    const float u1 = 1.0f - block[i];  // (0, 1]: the logarithm stays finite
    const float u2 = block[i + 8];
    const float radius = std::sqrt(-2.0f * std::log(u1));
    const float theta = static_cast<float>(kTwoPi) * u2;
    block[i] = radius * std::cos(theta);
    block[i + 8] = radius * std::sin(theta);
  }
}

void randn_few(std::mt19937& engine, float* out, std::size_t count) {
  for (std::size_t i = 0; i < count; i += 2) {
    const double u1 = uniform_double(engine);
    const double u2 = uniform_double(engine);
    const double radius = std::sqrt(-2.0 * std::log1p(-u2));
    out[i] = static_cast<float>(radius * std::cos(kTwoPi * u1));
    if (i + 1 < count) out[i + 1] = static_cast<float>(radius * std::sin(kTwoPi * u1));
  }
}

}  // namespace

void NormalStream::draw(float* out, std::size_t count) {
  if (count < 16) {
    randn_few(engine_, out, count);
    return;
  }
  for (std::size_t i = 0; i < count; ++i) out[i] = uniform_float(engine_);
  for (std::size_t i = 0; i + 16 <= count; i += 16) box_muller_16(out + i);
  if (count % 16 != 0) {
    // The last sixteen are drawn again, over the tail of the last whole block.
    float* tail = out + count - 16;
    for (int i = 0; i < 16; ++i) tail[i] = uniform_float(engine_);
    box_muller_16(tail);
  }
}

void randn(std::uint64_t seed, float* out, std::size_t count) {
  NormalStream(seed).draw(out, count);
}

}  // namespace zimage_rt
