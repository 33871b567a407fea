#pragma once

// The kernel of conv3x3.h.
//
// Implicit GEMM: a block keeps the weights of its output channels in shared memory and iterates
// over tiles of output pixels. The input pixels of a tile, with their halo, are loaded once for all
// nine taps; with two stages the next tile is loaded while this one is multiplied.
//
// Shared memory: packed weights | bias fp32 | stages of [tile_in_height, tile_in_width, channels].
// The 16-byte chunks of a pixel are swizzled (`chunk_phase`), so that the eight rows of an
// ldmatrix, which are eight neighbouring pixels, have no bank conflicts.
//
// A warp computes kWarpRows x 16 pixels, each row of 16 one m16 tile. For a column dx and 16 input
// channels it loads each input row once and uses it for up to three output rows (dy), so that the
// tensor cores, not shared memory, are the bound.
//
// Packed weights: [dx][in / 16][dy][pair][lane] of 16 bytes, `pair` 16 output channels, in the
// order that a lane holds mma.m16n8k16's B: {b0, b1} of the pair's first n8 tile, then of its
// second. In layers with 64 outputs the channels are permuted (`output_channel`), so that a lane's
// sums over four n8 tiles are eight consecutive channels: 16-byte stores need no shuffle.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/conv3x3.h"
#include "kernels/early_start.cuh"
#include "kernels/numeric.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace conv3x3_detail {

constexpr int kWideChannels = kConvWideChannels;
constexpr int kNarrowChannels = kConvNarrowChannels;
constexpr std::size_t kBiasBytes = kWideChannels * sizeof(float);

constexpr int padded(int channels) {
  return channels <= kNarrowChannels ? kNarrowChannels : kWideChannels;
}

// The output channel in column `n` of n8 tile `tile`; a lane holds columns 2t and 2t + 1.
__host__ __device__ constexpr int output_channel(bool wide, int tile, int n) {
  return wide ? 32 * (tile / 4) + 8 * (n / 2) + 2 * (tile % 4) + n % 2 : 8 * tile + n;
}

// A tiling. kBlockChannels: output channels of a block, as packed; kWarpChannels: output channels
// of a warp, 8 if only half of a packed pair is used.
template <int kIn, int kBlockChannels, int kWarpChannels, int kTileHeight, int kTileWidth,
          int kWarpRows_, int kStages_, int kStride_>
struct TileConfig {
  static constexpr int in_channels = kIn;
  static constexpr int stride = kStride_, stages = kStages_;
  static constexpr int tile_height = kTileHeight, tile_width = kTileWidth;
  static constexpr int in_height = (kTileHeight - 1) * kStride_ + 3;
  static constexpr int in_width = (kTileWidth - 1) * kStride_ + 3;
  static constexpr int chunks = kIn / 8;  // of 16 bytes per pixel
  static constexpr int pixel_bytes = kIn * 2;
  static constexpr int stage_bytes = in_height * in_width * pixel_bytes;

  static constexpr int block_channels = kBlockChannels, warp_channels = kWarpChannels;
  static constexpr int block_pairs = kBlockChannels / 16;
  static constexpr int warp_pairs = ceil_div(kWarpChannels, 16);
  static constexpr int warp_tiles = kWarpChannels / 8;
  static constexpr int warp_rows = kWarpRows_;
  static constexpr int warp_in_rows = (kWarpRows_ - 1) * kStride_ + 3;
  static constexpr int warps_x = kTileWidth / 16, warps_y = kTileHeight / kWarpRows_;
  static constexpr int warps_n = block_pairs / warp_pairs;
  static constexpr int threads = 32 * warps_x * warps_y * warps_n;

  static constexpr int weight_units = 9 * (kIn / 16) * block_pairs * 32;  // of 16 bytes
  static constexpr int shared_bytes =
      weight_units * 16 + static_cast<int>(kBiasBytes) + stages * stage_bytes;
};

// The swizzle of a pixel's chunks, by XOR: differs between eight pixels that are `stride` apart.
template <typename C>
__device__ inline unsigned chunk_phase(unsigned x) {
  return x / (C::stride * (8 / C::chunks)) % C::chunks;
}

struct Params {
  const void* input;
  const uint4* packed;
  const void* residual;
  void* output;
  int height, width;  // of the input as the convolution sees it: doubled if upsample
  int out_height, out_width, out_channels;
  int tiles_x, tiles_y, tiles;
  int upsample;  // 0 or 1: a shift
  bool relu;
  float scale, shift;
  int* not_finite;
};

struct Tile {
  int image, y, x;  // first output pixel
};

template <typename C>
__device__ inline Tile tile_at(const Params& p, int index) {
  const int row = index / p.tiles_x;
  return {row / p.tiles_y, row % p.tiles_y * C::tile_height,
          (index - row * p.tiles_x) * C::tile_width};
}

// The input of a tile: its image, and its first pixel, which may be outside of the image.
struct Source {
  const char* image;
  int y, x;
};

template <typename C>
__device__ inline Source source_of(const Params& p, const Tile& tile) {
  const std::int64_t pixels =
      static_cast<std::int64_t>(p.height >> p.upsample) * (p.width >> p.upsample);
  return {static_cast<const char*>(p.input) + tile.image * pixels * C::pixel_bytes,
          tile.y * C::stride - 1, tile.x * C::stride - 1};
}

// Starts the copy of this thread's `round`-th chunk of a tile's input; zeros outside of the image.
// It is short and has no branch, because it is interleaved with the products.
template <typename C>
__device__ inline void copy_chunk(const Params& p, const Source& source, std::uint32_t stage,
                                  unsigned round) {
  const unsigned unit = threadIdx.x + round * C::threads;
  const unsigned pixel = unit / C::chunks, chunk = unit % C::chunks;
  const unsigned row = pixel / C::in_width, column = pixel % C::in_width;
  const unsigned y = source.y + row, x = source.x + column;  // -1 wraps around
  const bool inside = y < static_cast<unsigned>(p.height) && x < static_cast<unsigned>(p.width);
  const unsigned place = chunk ^ chunk_phase<C>(column);
  const unsigned offset = (y >> p.upsample) * (p.width >> p.upsample) + (x >> p.upsample);
  // Nothing is read outside of the image, but the address must be valid.
  const char* from =
      source.image + static_cast<std::uint64_t>(inside ? offset : 0) * C::pixel_bytes;
  const std::uint32_t to = stage + pixel * C::pixel_bytes + place * 16;
  asm volatile(
      "{\n"
      "  .reg .pred exists;\n"
      "  setp.ne.b32 exists, %3, 0;\n"
      "  @exists cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
      "}" ::"r"(to),
      "l"(from + chunk * 16), "r"(inside ? 16 : 0),
      "r"(static_cast<int>(pixel < C::in_height * C::in_width))
      : "memory");
}

template <typename C>
constexpr int kCopyRounds = ceil_div(C::in_height * C::in_width * C::chunks, C::threads);

template <typename C>
__device__ inline void copy_tile(const Params& p, const Source& source, std::uint32_t stage) {
  for (int round = 0; round < kCopyRounds<C>; ++round) copy_chunk<C>(p, source, stage, round);
}

template <typename C, typename T>
using Sums = float[C::warp_rows][C::warp_tiles][4];

// The position of this warp and lane in a tile.
struct Place {
  int lane, row, column, channel;  // first output row, column and channel of the warp
};

template <typename C>
__device__ inline Place place_of_warp() {
  const int warp = threadIdx.x / 32;
  const int pixels = warp / C::warps_n;
  return {static_cast<int>(threadIdx.x) % 32, pixels / C::warps_x * C::warp_rows,
          pixels % C::warps_x * 16, warp % C::warps_n * C::warp_channels};
}

// Multiplies the tile in `stage`. With two stages it also starts the copies of `next`, a few chunks
// per step, to interleave them with the products.
template <typename C, typename T>
__device__ inline void multiply(const Params& p, const Place& place, const uint4* weights,
                                std::uint32_t stage, const Source& next, std::uint32_t next_stage,
                                bool has_next, Sums<C, T>& sums) {
  constexpr int kSteps = C::in_channels / 16;
  constexpr int kRoundsPerStep = ceil_div(kCopyRounds<C>, 3 * kSteps);
  const uint4* fragments = weights + place.channel / 16 * 32 + place.lane;
  // ldmatrix: lanes 0..15 address the first 8 channels of the 16 pixels, lanes 16..31 the next 8.
  const int first_x = (place.column + place.lane % 16) * C::stride;
  const int half = place.lane / 16;
#pragma unroll 1
  for (int dx = 0; dx < 3; ++dx) {
    const int x = first_x + dx;
    const unsigned phase = chunk_phase<C>(x);
    const std::uint32_t rows = stage + (place.row * C::stride * C::in_width + x) * C::pixel_bytes;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if constexpr (C::stages > 1) {
        // Rounds after the last copy nothing. Without a branch, the compiler interleaves the
        // address arithmetic with the products.
        const int first = has_next ? (dx * kSteps + k) * kRoundsPerStep : kCopyRounds<C>;
#pragma unroll
        for (int i = 0; i < kRoundsPerStep; ++i) copy_chunk<C>(p, next, next_stage, first + i);
      }
      const std::uint32_t address = rows + ((2 * k + half) ^ phase) * 16;
      std::uint32_t a[C::warp_in_rows][4];
#pragma unroll
      for (int row = 0; row < C::warp_in_rows; ++row)
        ldmatrix_x4(address + row * C::in_width * C::pixel_bytes, a[row]);
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        uint4 b[C::warp_pairs];
#pragma unroll
        for (int pair = 0; pair < C::warp_pairs; ++pair)
          b[pair] = fragments[((k * 3 + dy) * C::block_pairs + pair) * 32];
#pragma unroll
        for (int row = 0; row < C::warp_rows; ++row) {
#pragma unroll
          for (int tile = 0; tile < C::warp_tiles; ++tile) {
            const uint4& pair = b[tile / 2];
            mma_m16n8k16(sums[row][tile], a[row * C::stride + dy], tile % 2 ? pair.z : pair.x,
                         tile % 2 ? pair.w : pair.y, static_cast<const T*>(nullptr));
          }
        }
      }
    }
    fragments += kSteps * 3 * C::block_pairs * 32;
  }
}

// Calls function(row of the warp, half, offset of the pixel in [batch, out_height, out_width]) for
// the lane's pixels inside the image: rows g (half 0) and g + 8 (half 1) of every m16 tile.
template <typename C, typename Function>
__device__ inline void for_pixels(const Params& p, const Tile& tile, const Place& place,
                                  Function&& function) {
#pragma unroll
  for (int row = 0; row < C::warp_rows; ++row) {
    const int y = tile.y + place.row + row;
    const std::int64_t line =
        (static_cast<std::int64_t>(tile.image) * p.out_height + y) * p.out_width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = tile.x + place.column + place.lane / 4 + 8 * half;
      if (y < p.out_height && x < p.out_width) function(row, half, line + x);
    }
  }
}

// The element-wise maximum of two pairs; propagates NaN.
__device__ inline std::uint32_t max2_nan(std::uint32_t a, std::uint32_t b, const __half*) {
  const __half2 pair =
      __hmax2_nan(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ inline std::uint32_t max2_nan(std::uint32_t a, std::uint32_t b, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                          *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// sums + bias (+ residual), ReLU, to [batch, height, width, 64].
template <typename C, typename T>
__device__ inline void store_half(const Params& p, const Tile& tile, const Place& place,
                                  int block_channel, const float* bias, const Sums<C, T>& sums) {
  constexpr int kGroups = C::warp_tiles / 4;  // of 32 channels, 8 of them this lane's
  const int first = block_channel + place.channel + place.lane % 4 * 8;
  float biases[kGroups][8];
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    load8(bias + place.channel + place.lane % 4 * 8 + group * 32, biases[group]);
  // All residuals are loaded before the first store, so that their latencies overlap; not through
  // L1, because each is read once. The output may be the residual: only this lane accesses these
  // elements.
  uint4 residuals[C::warp_rows][2][kGroups];
  if (p.residual != nullptr) {
    for_pixels<C>(p, tile, place, [&](int row, int half, std::int64_t pixel) {
      const T* source = static_cast<const T*>(p.residual) + pixel * kWideChannels + first;
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        residuals[row][half][group] = __ldcg(reinterpret_cast<const uint4*>(source + group * 32));
    });
  }
  const std::uint32_t floor =
      pack(p.relu ? 0.0f : -INFINITY, p.relu ? 0.0f : -INFINITY, static_cast<const T*>(nullptr));
  for_pixels<C>(p, tile, place, [&](int row, int half, std::int64_t pixel) {
    T* target = static_cast<T*>(p.output) + pixel * kWideChannels + first;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint4 added = residuals[row][half][group];
      const std::uint32_t added_words[4] = {added.x, added.y, added.z, added.w};
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* sum = &sums[row][group * 4 + i][half * 2];
        float2 pair = make_float2(sum[0] + biases[group][2 * i], sum[1] + biases[group][2 * i + 1]);
        if (p.residual != nullptr) {
          const float2 more = unpack(added_words[i], static_cast<const T*>(nullptr));
          pair.x += more.x, pair.y += more.y;
        }
        words[i] = max2_nan(pack(pair.x, pair.y, static_cast<const T*>(nullptr)), floor,
                            static_cast<const T*>(nullptr));
      }
      *reinterpret_cast<uint4*>(target + group * 32) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  });
}

// Rounds as decoding to fp32 does: image = 2 * value - 1.
__device__ inline std::uint8_t to_uint8(float value) {
  return image_to_uint8(__fadd_rn(__fmul_rn(value, 2.0f), -1.0f));
}

// sums + bias, as fp32 NCHW or as bytes: the last layers, with few channels.
template <typename C, typename T, Conv3x3Output kKind>
__device__ inline void store_narrow(const Params& p, const Tile& tile, const Place& place,
                                    const float* bias, const Sums<C, T>& sums) {
  const std::int64_t plane = static_cast<std::int64_t>(p.out_height) * p.out_width;
  const std::int64_t image_start = tile.image * plane;
  for_pixels<C>(p, tile, place, [&](int row, int half, std::int64_t pixel) {
#pragma unroll
    for (int n8 = 0; n8 < C::warp_tiles; ++n8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = n8 * 8 + place.lane % 4 * 2 + i;
        if (channel >= p.out_channels) continue;
        const float value = sums[row][n8][half * 2 + i] + bias[channel];
        if constexpr (kKind == Conv3x3Output::kUint8) {
          if (!isfinite(value) && p.not_finite != nullptr) *p.not_finite = 1;
          static_cast<std::uint8_t*>(p.output)[pixel * p.out_channels + channel] = to_uint8(value);
        } else {
          const std::int64_t target =
              (static_cast<std::int64_t>(tile.image) * p.out_channels + channel) * plane + pixel -
              image_start;
          static_cast<float*>(p.output)[target] = __fadd_rn(__fmul_rn(value, p.scale), p.shift);
        }
      }
    }
  });
}

// Prefetches the residual to L2, one line per pixel, while the tile is multiplied.
template <typename C, typename T>
__device__ inline void prefetch_residual(const Params& p, const Tile& tile, const Place& place) {
  if (p.residual == nullptr) return;
#pragma unroll
  for (int first = 0; first < C::warp_rows * 16; first += 32) {
    const int pixel = first + place.lane;
    const int y = tile.y + place.row + pixel / 16, x = tile.x + place.column + pixel % 16;
    if (pixel >= C::warp_rows * 16 || y >= p.out_height || x >= p.out_width) continue;
    const std::int64_t offset =
        (static_cast<std::int64_t>(tile.image) * p.out_height + y) * p.out_width + x;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(p.residual) +
                                                  offset * kWideChannels));
  }
}

// Grid: x iterates over tiles, y over blocks of output channels.
template <typename C, typename T, Conv3x3Output kKind>
__global__ void __launch_bounds__(C::threads) conv3x3_kernel(const Params p) {
  constexpr bool kWide = kKind == Conv3x3Output::kHalf;
  constexpr int kPairs = kWide ? kWideChannels / 16 : 1;  // packed, over all blocks
  extern __shared__ __align__(128) unsigned char shared[];
  const uint4* weights = reinterpret_cast<const uint4*>(shared);
  const float* bias = reinterpret_cast<const float*>(shared + C::weight_units * 16);
  const std::uint32_t stages =
      shared_address(shared) + C::weight_units * 16 + static_cast<int>(kBiasBytes);

  // A dependent kernel with early_start launches on free multiprocessors; it waits below.
  allow_early_start();
  for (int unit = threadIdx.x; unit < C::weight_units; unit += C::threads) {
    constexpr int kRun = C::block_pairs * 32;
    const int source = (unit / kRun * kPairs + blockIdx.y * C::block_pairs) * 32 + unit % kRun;
    cp_async_16(shared_address(weights + unit), p.packed + source, true);
  }
  if (threadIdx.x < kBiasBytes / 16) {
    const float* source =
        reinterpret_cast<const float*>(p.packed + 9 * (C::in_channels / 16) * kPairs * 32) +
        blockIdx.y * C::block_channels + threadIdx.x * 4;
    const bool inside = threadIdx.x * 4 < C::block_channels;
    cp_async_16(shared_address(bias + threadIdx.x * 4), source, inside);
  }
  wait_for_previous_kernel();

  const Place place = place_of_warp<C>();
  Tile tile = tile_at<C>(p, blockIdx.x);
  copy_tile<C>(p, source_of<C>(p, tile), stages);
  cp_async_commit();
  std::uint32_t stage = stages;
  for (int index = blockIdx.x; index < p.tiles;) {
    cp_async_wait<0>();
    // The tile is complete, and no warp reads the other stage any more.
    __syncthreads();
    index += gridDim.x;
    const bool has_next = index < p.tiles;
    const Tile next = tile_at<C>(p, index);
    const Source next_source = source_of<C>(p, next);
    const std::uint32_t next_stage =
        C::stages == 1 || stage != stages ? stages : stages + C::stage_bytes;
    if constexpr (kWide) prefetch_residual<C, T>(p, tile, place);

    Sums<C, T> sums = {};
    multiply<C, T>(p, place, weights, stage, next_source, next_stage, has_next, sums);
    if (C::stages == 1 && has_next) {
      __syncthreads();
      copy_tile<C>(p, next_source, next_stage);
    }
    cp_async_commit();
    if constexpr (kWide)
      store_half<C, T>(p, tile, place, blockIdx.y * C::block_channels, bias, sums);
    else
      store_narrow<C, T, kKind>(p, tile, place, bias, sums);
    tile = next;
    stage = next_stage;
  }
}

}  // namespace conv3x3_detail
}  // namespace zimage_rt
