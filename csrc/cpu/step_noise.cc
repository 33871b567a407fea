#include "cpu/step_noise.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iterator>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/rng.h"

namespace zimage_rt {
namespace {

// NumPy's SeedSequence (O'Neill's seed_seq_fe): entropy of any length hashed into a pool of words.
// Only the first word of its state is needed here.
class SeedHash {
 public:
  explicit SeedHash(const std::vector<std::uint32_t>& entropy) {
    for (std::size_t i = 0; i < pool_.size(); ++i)
      pool_[i] = hash(i < entropy.size() ? entropy[i] : 0);
    for (std::size_t from = 0; from < pool_.size(); ++from)
      for (std::size_t to = 0; to < pool_.size(); ++to)
        if (from != to) pool_[to] = mix(pool_[to], hash(pool_[from]));
    for (std::size_t from = pool_.size(); from < entropy.size(); ++from)
      for (std::uint32_t& word : pool_) word = mix(word, hash(entropy[from]));
  }

  std::uint32_t first_word() const {
    std::uint32_t word = pool_[0] ^ 0x8b51f9ddu;
    word *= 0x8b51f9ddu * 0x58f38dedu;
    return word ^ word >> 16;
  }

  static constexpr std::size_t kPool = 24;  // torchsde's pool_size

 private:
  std::uint32_t hash(std::uint32_t value) {
    value ^= factor_;
    factor_ *= 0x931e8875u;
    value *= factor_;
    return value ^ value >> 16;
  }

  static std::uint32_t mix(std::uint32_t a, std::uint32_t b) {
    const std::uint32_t mixed = 0xca01f9ddu * a - 0x4973f715u * b;
    return mixed ^ mixed >> 16;
  }

  std::array<std::uint32_t, kPool> pool_{};
  std::uint32_t factor_ = 0x43b0d7e5u;
};

std::vector<std::uint32_t> words_of(std::uint64_t seed) {
  std::vector<std::uint32_t> words = {static_cast<std::uint32_t>(seed)};
  if (seed >> 32 != 0) words.push_back(static_cast<std::uint32_t>(seed >> 32));
  return words;
}

std::uint32_t root_seed(std::uint64_t seed) { return SeedHash(words_of(seed)).first_word(); }

// SeedSequence(seed, spawn_key=(key, depth)): the seed is padded to the pool, the key follows.
std::uint32_t node_seed(std::uint64_t seed, std::uint64_t key, std::uint32_t depth) {
  std::vector<std::uint32_t> entropy = words_of(seed);
  entropy.resize(SeedHash::kPool, 0);
  const std::vector<std::uint32_t> spawn = words_of(key);
  entropy.insert(entropy.end(), spawn.begin(), spawn.end());
  entropy.push_back(depth);
  return SeedHash(entropy).first_word();
}

// To 6 decimals, correctly rounded like Python's round(): midpoints are often exact ties.
double rounded(double value) {
  std::array<char, 400> text{};  // the largest double has 309 digits before the point
  std::snprintf(text.data(), text.size(), "%.6f", value);
  return std::strtod(text.data(), nullptr);
}

// The path from range.low to `end`, both rounded already: `at` [size].
void brownian_path(std::uint64_t seed, const BrownianRange& range, double end, std::size_t size,
                   float* at) {
  std::fill_n(at, size, 0.0f);
  double low = range.low, high = range.high;
  if (end <= low) return;
  std::vector<float> width(size), half(size);  // the increment over [low, high], over its left half
  randn(root_seed(seed), width.data(), size);
  const auto length = static_cast<float>(std::sqrt(high - low));
  for (float& value : width) value *= length;
  std::uint64_t key = 0;
  for (std::uint32_t depth = 0; end < high; ++depth) {
    const double middle = rounded((low + high) / 2);
    randn(node_seed(seed, key, depth), half.data(), size);
    const auto share = static_cast<float>((middle - low) / (high - low));
    const auto spread =
        static_cast<float>(std::sqrt((middle - low) * (high - middle) / (high - low)));
    const bool left = end <= middle;
    for (std::size_t i = 0; i < size; ++i) {
      const float part = width[i] * share + spread * half[i];
      if (left) {
        width[i] = part;
      } else {
        at[i] += part;
        width[i] -= part;
      }
    }
    key = 2 * key + (left ? 0 : 1);
    (left ? high : low) = middle;
    if (end <= low) return;
  }
  for (std::size_t i = 0; i < size; ++i) at[i] += width[i];
}

// Runs work(0) … work(count - 1) on as many threads as there are cores. Rethrows an exception of
// one of them.
void in_parallel(std::size_t count, const std::function<void(std::size_t)>& work) {
  const std::size_t cores = std::max(1u, std::thread::hardware_concurrency());
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto take = [&] {
    try {
      for (std::size_t i = next++; i < count; i = next++) work(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (std::size_t i = 1; i < std::min(cores, count); ++i) others.emplace_back(take);
  } catch (const std::system_error&) {
    // No more threads can be created; the existing ones do the work.
  }
  take();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace

void stream_noise(const std::vector<std::uint64_t>& seeds, std::size_t draws, std::size_t size,
                  float* out) {
  in_parallel(seeds.size(), [&](std::size_t i) {
    NormalStream stream(seeds[i]);
    for (std::size_t draw = 0; draw < draws; ++draw)
      stream.draw(out + (draw * seeds.size() + i) * size, size);
  });
}

void brownian_noise(const std::vector<std::uint64_t>& seeds, const BrownianRange& range,
                    const std::vector<std::pair<double, double>>& intervals, std::size_t size,
                    float* out) {
  const BrownianRange ends = {rounded(range.low), rounded(range.high)};
  const auto inside = [&](double end) { return std::clamp(rounded(end), ends.low, ends.high); };
  std::vector<double> points;  // neighbouring intervals share ends
  for (const auto& [from, to] : intervals) {
    points.push_back(inside(from));
    points.push_back(inside(to));
  }
  std::sort(points.begin(), points.end());
  points.erase(std::unique(points.begin(), points.end()), points.end());
  const auto index = [&](double end) {
    return static_cast<std::size_t>(
        std::distance(points.begin(), std::lower_bound(points.begin(), points.end(), inside(end))));
  };
  std::vector<float> paths(points.size() * seeds.size() * size);
  in_parallel(points.size() * seeds.size(), [&](std::size_t i) {
    brownian_path(seeds[i % seeds.size()], ends, points[i / seeds.size()], size,
                  paths.data() + i * size);
  });
  const std::size_t row = seeds.size() * size;
  for (std::size_t i = 0; i < intervals.size(); ++i) {
    const auto [from, to] = intervals[i];
    const float* const before = paths.data() + index(from) * row;
    const float* const after = paths.data() + index(to) * row;
    // If `from` is the higher end, the difference is the negative increment, as it should be.
    const auto length = static_cast<float>(std::sqrt(std::abs(from - to)));
    for (std::size_t j = 0; j < row; ++j) out[i * row + j] = (after[j] - before[j]) / length;
  }
}

}  // namespace zimage_rt
