#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "device/check.h"
#include "kernels/conv2d.h"
#include "kernels/group_norm.h"
#include "kernels/numeric.cuh"

namespace zimage_rt {
namespace {

constexpr int kStatisticsThreads = 512;

__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sums over a block, the same in every thread. `scratch` is used once.
__device__ inline double2 block_sum(double2 value, double2* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = make_double2(warp_sum(value.x), warp_sum(value.y));
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  const bool has = lane < kStatisticsThreads / 32;
  return make_double2(warp_sum(has ? scratch[lane].x : 0.0), warp_sum(has ? scratch[lane].y : 0.0));
}

// One block per group.
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_kernel(const GroupNormStatistics args) {
  __shared__ double2 scratch[kStatisticsThreads / 32];
  const int width = args.channels / args.groups, first = static_cast<int>(blockIdx.x) * width;
  // Sums of `parts` x `width` numbers, each in double: the square of the mean and that of the
  // values may differ little.
  double2 total = make_double2(0.0, 0.0);
  const int parts_per_round = kStatisticsThreads / width;
  const int own = static_cast<int>(threadIdx.x) / width;
  const ChannelSums* const sums = args.sums + first + static_cast<int>(threadIdx.x) % width;
  if (own < parts_per_round) {
#pragma unroll 4
    for (int part = own; part < args.parts; part += parts_per_round) {
      const ChannelSums found = sums[static_cast<std::int64_t>(part) * args.channels];
      total.x += found.sum;
      total.y += found.squares;
    }
  }
  total = block_sum(total, scratch);
  const double values = static_cast<double>(args.pixels) * width;
  const double mean = total.x / values;
  const double variance = max(total.y / values - mean * mean, 0.0);
  const double inverse = 1.0 / sqrt(variance + static_cast<double>(args.eps));
  for (int i = threadIdx.x; i < width; i += kStatisticsThreads) {
    const double scale = inverse * args.weight[first + i];
    args.affine[first + i] = {.scale = static_cast<float>(scale),
                              .shift = static_cast<float>(args.bias[first + i] - mean * scale)};
  }
}

constexpr int kApplyThreads = 256;
// Vectors of eight values that a thread loads at once.
constexpr int kVectors = 4;

__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// A thread computes the same eight channels of several pixels.
template <typename T, bool kSilu>
__global__ void __launch_bounds__(kApplyThreads)
    apply_kernel(const T* x, T* out, std::int64_t pixels, int channels,
                 const ChannelAffine* affine) {
  const int chunks = channels / 8;
  const int chunk = static_cast<int>(threadIdx.x) % chunks;
  const int pixels_per_round = kApplyThreads / chunks;
  if (static_cast<int>(threadIdx.x) >= pixels_per_round * chunks) return;
  float scale[8], shift[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const ChannelAffine own = affine[chunk * 8 + i];
    scale[i] = own.scale, shift[i] = own.shift;
  }
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kVectors * pixels_per_round +
                             static_cast<int>(threadIdx.x) / chunks;
  float values[kVectors][8];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const std::int64_t pixel = first + i * pixels_per_round;
    if (pixel < pixels) load8(x + pixel * channels + chunk * 8, values[i]);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const std::int64_t pixel = first + i * pixels_per_round;
    if (pixel >= pixels) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float value = values[i][j] * scale[j] + shift[j];
      values[i][j] = kSilu ? silu(value) : value;
    }
    store8(out + pixel * channels + chunk * 8, values[i]);
  }
}

}  // namespace

void group_norm_statistics(const GroupNormStatistics& args, cudaStream_t stream) {
  if (args.groups < 1 || args.channels % args.groups != 0 ||
      args.channels / args.groups > kStatisticsThreads || args.parts < 1 || args.pixels < 1)
    throw std::invalid_argument(
        "group_norm: expected groups of at most 512 channels that divide the channels, and parts");
  statistics_kernel<<<static_cast<unsigned>(args.groups), kStatisticsThreads, 0, stream>>>(args);
  ZRT_LAUNCHED();
}

void group_norm_apply(const GroupNormApply& args, cudaStream_t stream) {
  if (args.channels < 8 || args.channels % 8 != 0 || args.channels > 8 * kApplyThreads)
    throw std::invalid_argument("group_norm: expected a multiple of 8 channels, at most 2048");
  const int per_block = kVectors * (kApplyThreads / (args.channels / 8));
  const auto blocks = static_cast<unsigned>((args.pixels + per_block - 1) / per_block);
  for_half_type(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* const x = static_cast<const T*>(args.x);
    T* const out = static_cast<T*>(args.out);
    if (args.silu)
      apply_kernel<T, true>
          <<<blocks, kApplyThreads, 0, stream>>>(x, out, args.pixels, args.channels, args.affine);
    else
      apply_kernel<T, false>
          <<<blocks, kApplyThreads, 0, stream>>>(x, out, args.pixels, args.channels, args.affine);
    ZRT_LAUNCHED();
  });
}

}  // namespace zimage_rt
