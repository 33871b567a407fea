// The convolution for any device from sm_80: an implicit product with mma.sync. A block computes
// 16 x 8 pixels and kBlockN output channels; a step along k is one tap's 64 input channels.
//
// Shared memory: stages of the pixels [128, 64] and the weights [kBlockN, 64], in rows of 128
// bytes whose eight chunks of 16 bytes are swizzled by XOR with the row, so that the eight rows of
// an ldmatrix have no bank conflicts.

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/check.h"
#include "kernels/conv2d.h"
#include "kernels/conv2d_form.cuh"
#include "kernels/numeric.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace conv2d_detail {

void check(const Conv2d& args) {
  const bool half = args.output_kind == Conv2dOutput::kHalf;
  const bool channels = args.in_channels > 0 && args.in_channels % 8 == 0 &&
                        args.out_channels > 0 && (!half || args.out_channels % 8 == 0);
  const bool up = args.kind == Conv2dKind::k3x3Up;
  if (!channels || args.height < 1 || args.width < 1 || args.out_height() < 1 ||
      args.out_width() < 1 || (!half && (up || args.residual != nullptr || args.sums != nullptr)))
    throw std::invalid_argument(
        "conv2d: no kernel for " + std::to_string(args.height) + " x " +
        std::to_string(args.width) + " pixels, " + std::to_string(args.in_channels) + " -> " +
        std::to_string(args.out_channels) + " channels" + (half ? "" : " as planes or bytes"));
}

}  // namespace conv2d_detail

namespace {

using namespace conv2d_detail;

constexpr int kRowBytes = kChunk * 2;
constexpr int kChunksPerRow = kRowBytes / 16;
constexpr int kStages = 3;
constexpr int kWarps = 8, kThreads = kWarps * 32;

// A block's output channels, and how its warps share pixels and channels.
template <int kBlockN_>
struct Tiling {
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kWarpsN = kBlockN >= 128 ? 2 : 1, kWarpsM = kWarps / kWarpsN;
  static constexpr int kWarpPixels = kTilePixels / kWarpsM, kWarpChannels = kBlockN / kWarpsN;
  static constexpr int kPixelTiles = kWarpPixels / 16, kChannelTiles = kWarpChannels / 8;
  static constexpr int kStageBytes = (kTilePixels + kBlockN) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};
using Wide = Tiling<128>;   // 96 KB of shared memory
using Narrow = Tiling<16>;  // 54 KB; images and latents
int tiles_of(const Form& form) {
  return ceil_div(form.grid_width, kTileWidth) * ceil_div(form.grid_height, kTileHeight);
}

// The shared address of a 16-byte chunk of a stage's row.
__device__ inline std::uint32_t chunk_at(std::uint32_t rows, int row, int chunk) {
  return rows + row * kRowBytes + ((chunk ^ (row % kChunksPerRow)) * 16);
}

// This thread's share of the copies of a stage: one chunk of every 32nd row.
class StageCopy {
 public:
  static constexpr int kRowsPerRound = kThreads / kChunksPerRow;

  __device__ StageCopy(const Form& form, const void* input, const void* weights, int tile_y,
                       int tile_x, int first_channel)
      : form_(form),
        input_(static_cast<const char*>(input)),
        weights_(static_cast<const char*>(weights)),
        row_(threadIdx.x / kChunksPerRow),
        chunk_(threadIdx.x % kChunksPerRow),
        y_((tile_y + row_ / kTileWidth) * form.stride + form.origin_y),
        x_((tile_x + row_ % kTileWidth) * form.stride + form.origin_x),
        first_channel_(first_channel) {}

  // Starts the copies of step `k`.
  template <int kBlockN>
  __device__ void start(int k, std::uint32_t stage) const {
    static_assert(kRowsPerRound % kTileWidth == 0);
    const int tap = k / form_.chunks, channel = (k - tap * form_.chunks) * kChunk + chunk_ * 8;
    const int x = x_ + tap % form_.taps, first_y = y_ + tap / form_.taps;
    const bool column_inside = x >= 0 && x < form_.in_width && channel < form_.in_channels;
#pragma unroll
    for (int row = 0; row < kTilePixels; row += kRowsPerRound) {
      const int y = first_y + row / kTileWidth * form_.stride;
      const bool inside = column_inside && y >= 0 && y < form_.in_height;
      // Nothing is read outside of the image, but the address must be valid.
      const std::int64_t pixel = inside ? static_cast<std::int64_t>(y) * form_.in_width + x : 0;
      const char* from = input_ + (pixel * form_.in_channels + (inside ? channel : 0)) * 2;
      cp_async_16(chunk_at(stage, row_ + row, chunk_), from, inside);
    }
    const std::uint32_t to = stage + kTilePixels * kRowBytes;
    const std::int64_t row_bytes = static_cast<std::int64_t>(form_.k_tiles()) * kRowBytes;
#pragma unroll
    for (int row = 0; row < kBlockN; row += kRowsPerRound) {
      if (row_ + row >= kBlockN) break;
      const bool inside = first_channel_ + row_ + row < form_.out_channels;
      const std::int64_t line = inside ? first_channel_ + row_ + row : 0;
      cp_async_16(chunk_at(to, row_ + row, chunk_),
                  weights_ + line * row_bytes + k * kRowBytes + chunk_ * 16, inside);
    }
  }

 private:
  const Form& form_;
  const char *input_, *weights_;
  int row_, chunk_, y_, x_, first_channel_;
};

template <typename C>
using Sums = float[C::kPixelTiles][C::kChannelTiles][4];

// The part of a tile in a warp's registers: its first pixel and output channel.
struct WarpTile {
  int y, x, pixel, channel, lane;
};

template <typename C, typename T>
__device__ inline void multiply(std::uint32_t stage, const WarpTile& at, int block_channel,
                                Sums<C>& sums) {
  const std::uint32_t weights = stage + kTilePixels * kRowBytes;
  const int lane = at.lane;
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    std::uint32_t a[C::kPixelTiles][4];
#pragma unroll
    for (int i = 0; i < C::kPixelTiles; ++i)
      ldmatrix_x4(chunk_at(stage, at.pixel + 16 * i + lane % 16, 2 * step + lane / 16), a[i]);
#pragma unroll
    for (int pair = 0; pair < C::kChannelTiles / 2; ++pair) {
      std::uint32_t b[4];
      const int row = at.channel - block_channel + 16 * pair + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(chunk_at(weights, row, 2 * step + lane / 8 % 2), b);
#pragma unroll
      for (int i = 0; i < C::kPixelTiles; ++i) {
        mma_m16n8k16(sums[i][2 * pair], a[i], b[0], b[1], static_cast<const T*>(nullptr));
        mma_m16n8k16(sums[i][2 * pair + 1], a[i], b[2], b[3], static_cast<const T*>(nullptr));
      }
    }
  }
}

// 16-bit output: 16 bytes per lane. `totals_out` receives the sums of each of the warp's channels
// over its pixels.
template <typename C, typename T>
__device__ inline void store_half(const Form& form, const Target& target, const WarpTile& at,
                                  const Sums<C>& sums, ChannelSums* totals_out) {
  const int g = at.lane / 4, t = at.lane % 4;
  constexpr const T* kType = nullptr;
#pragma unroll
  for (int first = 0; first < C::kChannelTiles; first += 4) {
    // The lane's sums are of channels 8 i + 2 t and the next; it stores the eight of tile t.
    const int channel = at.channel + 8 * first, stored = channel + 8 * t;
    float offsets[4][2];
    ChannelSums totals[4][2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int own = channel + 8 * i + 2 * t + j;
        offsets[i][j] = own < form.out_channels ? target.offset(own) : 0.0f;
      }
#pragma unroll
    for (int tile = 0; tile < C::kPixelTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = at.pixel + 16 * tile + 8 * half + g;
        const int y = at.y + pixel / kTileWidth, x = at.x + pixel % kTileWidth;
        const bool in_grid = y < form.grid_height && x < form.grid_width;
        const bool inside = in_grid && stored < form.out_channels;
        const std::int64_t place = inside ? out_pixel(form, y, x) * form.out_channels + stored : 0;
        std::uint32_t more[4] = {};
        if (target.residual != nullptr) {
          if (inside) {
            const Half8 packed =
                *reinterpret_cast<const Half8*>(static_cast<const T*>(target.residual) + place);
#pragma unroll
            for (int i = 0; i < 4; ++i) more[i] = packed.words[i];
          }
          transpose_quad(more, t);
        }
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* sum = &sums[tile][first + i][2 * half];
          const float2 added = unpack(more[i], kType);
          const float a = sum[0] * target.sum_scale + offsets[i][0] + added.x;
          const float b = sum[1] * target.sum_scale + offsets[i][1] + added.y;
          words[i] = pack(a, b, kType);
          if (in_grid) {
            totals[i][0].sum += a, totals[i][0].squares += a * a;
            totals[i][1].sum += b, totals[i][1].squares += b * b;
          }
        }
        transpose_quad(words, t);
        if (inside)
          *reinterpret_cast<Half8*>(static_cast<T*>(target.output) + place) =
              Half8{{words[0], words[1], words[2], words[3]}};
      }
    if (target.sums == nullptr) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        ChannelSums total = totals[i][j];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          total.sum += __shfl_xor_sync(0xffffffffu, total.sum, offset);
          total.squares += __shfl_xor_sync(0xffffffffu, total.squares, offset);
        }
        if (g == 0) totals_out[8 * (first + i) + 2 * t + j] = total;
      }
  }
}

// fp32 planes or bytes, of few channels.
template <typename C>
__device__ inline void store_singles(const Form& form, const Target& target, const WarpTile& at,
                                     const Sums<C>& sums) {
#pragma unroll
  for (int tile = 0; tile < C::kPixelTiles; ++tile)
#pragma unroll
    for (int n8 = 0; n8 < C::kChannelTiles; ++n8)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pixel = at.pixel + 16 * tile + 8 * (i / 2) + at.lane / 4;
        const int y = at.y + pixel / kTileWidth, x = at.x + pixel % kTileWidth;
        const int channel = at.channel + 8 * n8 + 2 * (at.lane % 4) + i % 2;
        if (y < form.grid_height && x < form.grid_width && channel < form.out_channels)
          store_single(form, target, channel, out_pixel(form, y, x),
                       sums[tile][n8][i] * target.sum_scale + target.offset(channel));
      }
}

template <typename C, typename T, bool kHalf>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_mma_kernel(const Form form, const void* input, const void* weights,
                      const Target target) {
  extern __shared__ __align__(128) std::byte shared[];
  const std::uint32_t stages = shared_address(shared);
  const int tiles_x = ceil_div(form.grid_width, kTileWidth);
  const int tile = blockIdx.x, block_channel = blockIdx.y * C::kBlockN;
  const int tile_y = tile / tiles_x * kTileHeight, tile_x = tile % tiles_x * kTileWidth;
  const StageCopy copy(form, input, weights, tile_y, tile_x, block_channel);
  const int k_tiles = form.k_tiles();
#pragma unroll
  for (int k = 0; k < kStages - 1; ++k) {
    if (k < k_tiles) copy.start<C::kBlockN>(k, stages + k * C::kStageBytes);
    cp_async_commit();
  }
  const int warp = threadIdx.x / 32;
  const WarpTile at{.y = tile_y,
                    .x = tile_x,
                    .pixel = warp / C::kWarpsN * C::kWarpPixels,
                    .channel = block_channel + warp % C::kWarpsN * C::kWarpChannels,
                    .lane = static_cast<int>(threadIdx.x) % 32};
  Sums<C> sums = {};
  for (int k = 0, stage = 0, next = kStages - 1; k < k_tiles; ++k) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the copies of all threads are there, and the stage before may be written
    if (k + kStages - 1 < k_tiles)
      copy.start<C::kBlockN>(k + kStages - 1, stages + next * C::kStageBytes);
    cp_async_commit();
    multiply<C, T>(stages + stage * C::kStageBytes, at, block_channel, sums);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  if constexpr (kHalf) {
    auto* const totals = reinterpret_cast<ChannelSums(*)[C::kBlockN]>(shared);  // [kWarpsM]
    __syncthreads();  // all have read the last stage
    store_half<C, T>(form, target, at, sums,
                     totals[warp / C::kWarpsN] + (at.channel - block_channel));
    if (target.sums == nullptr) return;
    __syncthreads();
    const int channel = block_channel + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) >= C::kBlockN || channel >= form.out_channels) return;
    ChannelSums total = totals[0][threadIdx.x];
    for (int i = 1; i < C::kWarpsM; ++i) {
      total.sum += totals[i][threadIdx.x].sum;
      total.squares += totals[i][threadIdx.x].squares;
    }
    target.sums[static_cast<std::int64_t>(tile) * form.out_channels + channel] = total;
  } else {
    store_singles<C>(form, target, at, sums);
  }
}

template <typename C, typename T, bool kHalf>
void launch(const Form& form, const void* input, const void* weights, const Target& target,
            cudaStream_t stream) {
  const auto kernel = conv2d_mma_kernel<C, T, kHalf>;
  // Function attributes are per device: a bit mask of those for which it is set.
  static std::atomic<std::uint64_t> configured{0};
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if ((configured.load() & bit) == 0) {
    ZRT_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
    configured.fetch_or(bit);
  }
  const dim3 grid(static_cast<unsigned>(tiles_of(form)),
                  static_cast<unsigned>(ceil_div(form.out_channels, C::kBlockN)));
  kernel<<<grid, kThreads, C::kSharedBytes, stream>>>(form, input, weights, target);
  ZRT_LAUNCHED();
}

}  // namespace

int conv2d_mma(const Conv2d& args, cudaStream_t stream) {
  check(args);
  int parts = 0;
  for (int index = 0; index < forms_of(args.kind); ++index) {
    const Form form = form_of(args, index);
    const Target target = target_of(args, parts);
    for_half_type(args.dtype, [&](auto tag) {
      using T = decltype(tag);
      if (args.output_kind == Conv2dOutput::kHalf)
        launch<Wide, T, true>(form, args.input, form_weights(args, index), target, stream);
      else
        launch<Narrow, T, false>(form, args.input, form_weights(args, index), target, stream);
    });
    parts += tiles_of(form);
  }
  return parts;
}

// Each tile is a part; those of conv2d_hopper are larger.
int conv2d_max_parts(const Conv2d& args) {
  return forms_of(args.kind) * tiles_of(form_of(args, 0));
}

}  // namespace zimage_rt
