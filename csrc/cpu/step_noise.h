#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace zimage_rt {

// Noise that stochastic samplers add between steps. `seeds` has one entry per run of `size`
// numbers; a run is a sample of a batch, or a whole batch that shares one generator.

// out [draws, seeds, size]: draw i of a run is the i-th torch.randn(size) of a CPU generator
// with its seed.
void stream_noise(const std::vector<std::uint64_t>& seeds, std::size_t draws, std::size_t size,
                  float* out);

// A Brownian path over [low, high], as torchsde's BrownianTree builds it (Li et al. 2020): a binary
// tree of halves, whose midpoints are rounded to 6 decimals; every node draws from its own
// generator, so that the order of queries does not matter. All 64 bits of the seed are used.
struct BrownianRange {
  double low;
  double high;
};

// out [intervals, seeds, size]: for the interval (from, to) the path's increment from the lower to
// the higher of them, over sqrt(|from - to|), negative if from > to. Ends outside of the range are
// clamped to it.
void brownian_noise(const std::vector<std::uint64_t>& seeds, const BrownianRange& range,
                    const std::vector<std::pair<double, double>>& intervals, std::size_t size,
                    float* out);

}  // namespace zimage_rt
