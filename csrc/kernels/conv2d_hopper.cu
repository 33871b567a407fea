// The convolution on Hopper: the main loop of the fused products (fused_gemm_kernel.cuh) over
// weights [out_channels, k] and pixels [k, pixels], so that a block has 128 output channels and 256
// pixels. TMA makes the second operand from the image: the box of a tap is the tile's pixels,
// shifted, with zeros outside of the image. A k tile is one tap's 64 input channels.
//
// Output channels are the rows, because layers of 128 channels then fill a tile.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "device/dtype.h"
#include "kernels/conv2d.h"
#include "kernels/conv2d_form.cuh"
#include "kernels/fused_gemm_epilogues.cuh"
#include "kernels/fused_gemm_kernel.cuh"
#include "kernels/fused_gemm_launch.cuh"
#include "kernels/hopper.cuh"
#include "kernels/numeric.cuh"
#include "kernels/stream_k.cuh"
#include "kernels/tensor_core.cuh"
#include "kernels/tensor_map.h"

namespace zimage_rt {
namespace {

using namespace conv2d_detail;
namespace gemm = fused_gemm_detail;

// A block's pixels: two boxes, one below the other.
constexpr int kBlockHeight = gemm::kBlockN / kTileWidth;
static_assert(gemm::kBlockN == 2 * kTilePixels && kTilePixels == gemm::kBlockN / 2);
static_assert(kChunk * 2 == gemm::kRowBytes);

// The second operand is the taps of an image.
struct PixelBoxes {
  static constexpr bool kIsKMajor = true;
  // The input or, with a stride of 2, its pixels of each parity of row and column.
  CUtensorMap maps[4];
  int tiles_x, taps, chunks, stride, origin_y, origin_x;

#if ZRT_HOPPER
  __device__ void prefetch() const {
    for (int i = 0; i < (stride == 2 ? 4 : 1); ++i) prefetch_tensormap(maps + i);
  }
  // Half of a tile, from pixel `first`, counted over all tiles; see WeightBoxes.
  __device__ const CUtensorMap* at(int first, int k, int& x, int& y, int& z) const {
    const int tile = first / gemm::kBlockN, half = first % gemm::kBlockN / kTilePixels;
    const int tap = k / chunks;
    int tap_y = tap / taps, tap_x = tap % taps;
    const CUtensorMap* map = maps;
    if (stride == 2) {
      map += tap_y % 2 * 2 + tap_x % 2;
      tap_y /= 2, tap_x /= 2;
    }
    x = (k - tap * chunks) * kChunk;
    y = tile % tiles_x * kTileWidth + tap_x + origin_x;
    z = tile / tiles_x * kBlockHeight + half * kTileHeight + tap_y + origin_y;
    return map;
  }
#endif
};

static_assert(PixelBoxes::kIsKMajor);  // only the code for Hopper reads it

// Writes a tile: rows are output channels, columns the pixels of 16 image rows.
template <typename T, bool kHalf>
struct ConvEpilogue {
  Form form;
  Target target;
  int tiles_x;

  // Of the thread's two channels.
  struct Prefetched {
    float offsets[2];
  };
#if ZRT_HOPPER
  // Before the products: the residual's way to the L2 cache takes as long as a part of them. A
  // thread prefetches two of a warpgroup's 256 pixels, whose 64 channels are a line.
  __device__ void begin(const gemm::ThreadTile& tile) const {
    if (!kHalf || target.residual == nullptr) return;
    const int thread = threadIdx.x % 128;
    const int channel = tile.row - thread / 32 * 16 - thread % 32 / 4;
    const int index = tile.column / gemm::kBlockN;
#pragma unroll
    for (int pixel = thread; pixel < gemm::kBlockN; pixel += 128) {
      const int y = index / tiles_x * kBlockHeight + pixel / kTileWidth;
      const int x = index % tiles_x * kTileWidth + pixel % kTileWidth;
      if (y < form.grid_height && x < form.grid_width && channel < form.out_channels)
        prefetch_l2(static_cast<const T*>(target.residual) +
                    out_pixel(form, y, x) * form.out_channels + channel);
    }
  }
#endif
  __device__ Prefetched prefetch(const gemm::ThreadTile& tile) const {
    Prefetched out{};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (tile.row + 8 * half < form.out_channels)
        out.offsets[half] = target.offset(tile.row + 8 * half);
    return out;
  }

  __device__ void operator()(const float (&sums)[128], const Prefetched& prefetched,
                             const gemm::ThreadTile& tile) const {
    const int index = tile.column / gemm::kBlockN;
    const int y = index / tiles_x * kBlockHeight, x = index % tiles_x * kTileWidth;
    if constexpr (kHalf)
      store_half(sums, prefetched, tile, index, y, x);
    else
      store_singles(sums, prefetched, tile, y, x);
  }

  // A thread holds two neighbouring pixels of one channel in a register, of an 8 x 8 block of
  // channels and pixels; transposed, two neighbouring channels of a pixel. For one image row, four
  // such blocks are 16 channels of 16 pixels: block i has channels 8 (i % 2) and pixels 8 (i / 2).
  __device__ void store_half(const float (&sums)[128], const Prefetched& prefetched,
                             const gemm::ThreadTile& tile, int part, int first_y,
                             int first_x) const {
    constexpr const T* kType = nullptr;
    constexpr int kRows = 4;  // whose residuals are loaded at once
    const int t = tile.t, g = threadIdx.x % 32 / 4;
    const int x = first_x + 8 * (t / 2) + g, channel = tile.row - g + 8 * (t % 2);
    const bool column_inside = x < form.grid_width && channel < form.out_channels;
    ChannelSums totals[2] = {};
#pragma unroll
    for (int first = 0; first < kBlockHeight; first += kRows) {
      std::uint32_t more[kRows][4] = {};
      std::int64_t places[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int y = first_y + first + row;
        const bool inside = column_inside && y < form.grid_height;
        places[row] = inside ? out_pixel(form, y, x) * form.out_channels + channel : -1;
        if (target.residual == nullptr || !inside) continue;
        const Half8 packed =
            *reinterpret_cast<const Half8*>(static_cast<const T*>(target.residual) + places[row]);
#pragma unroll
        for (int i = 0; i < 4; ++i) more[row][i] = packed.words[i];
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (target.residual != nullptr) transpose_quad(more[row], t);
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i % 2, block = 2 * (first + row) + i / 2;
          float2 added = make_float2(0.0f, 0.0f);
          if (target.residual != nullptr) added = unpack(transpose_8x8(more[row][i]), kType);
          const float* sum = &sums[4 * block + 2 * half];
          const float a = sum[0] * target.sum_scale + prefetched.offsets[half] + added.x;
          const float b = sum[1] * target.sum_scale + prefetched.offsets[half] + added.y;
          words[i] = transpose_8x8(pack(a, b, kType));
          const int pixel = first_x + 8 * (i / 2) + 2 * t;
          const bool row_inside = first_y + first + row < form.grid_height;
          if (row_inside && pixel < form.grid_width)
            totals[half].sum += a, totals[half].squares += a * a;
          if (row_inside && pixel + 1 < form.grid_width)
            totals[half].sum += b, totals[half].squares += b * b;
        }
        transpose_quad(words, t);
        if (places[row] >= 0)
          *reinterpret_cast<Half8*>(static_cast<T*>(target.output) + places[row]) =
              Half8{{words[0], words[1], words[2], words[3]}};
      }
    }
    if (target.sums == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ChannelSums total = totals[half];
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        total.sum += __shfl_xor_sync(0xffffffffu, total.sum, offset);
        total.squares += __shfl_xor_sync(0xffffffffu, total.squares, offset);
      }
      const int own = tile.row + 8 * half;
      if (t == 0 && own < form.out_channels)
        target.sums[static_cast<std::int64_t>(part) * form.out_channels + own] = total;
    }
  }

  __device__ void store_singles(const float (&sums)[128], const Prefetched& prefetched,
                                const gemm::ThreadTile& tile, int first_y, int first_x) const {
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      const int block = i / 4, half = i / 2 % 2;
      const int y = first_y + block / 2, x = first_x + 8 * (block % 2) + 2 * tile.t + i % 2;
      const int channel = tile.row + 8 * half;
      if (y < form.grid_height && x < form.grid_width && channel < form.out_channels)
        store_single(form, target, channel, out_pixel(form, y, x),
                     sums[i] * target.sum_scale + prefetched.offsets[half]);
    }
  }
};

// The descriptor of every `stride`-th pixel of the input, from pixel (parity_y, parity_x).
CUtensorMap pixel_map(const Conv2d& args, const Form& form, int parity_y, int parity_x) {
  const auto wide = [](auto value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t pixel_bytes = wide(form.in_channels) * size_of(args.dtype);
  const cuuint64_t row_bytes = wide(form.in_width) * pixel_bytes;
  return encode_tensor_map(
      static_cast<const std::byte*>(args.input) + wide(parity_y) * row_bytes +
          wide(parity_x) * pixel_bytes,
      args.dtype,
      {.size = {wide(form.in_channels), wide(ceil_div(form.in_width - parity_x, form.stride)),
                wide(ceil_div(form.in_height - parity_y, form.stride))},
       .stride = {wide(form.stride) * pixel_bytes, wide(form.stride) * row_bytes},
       .box = {kChunk, kTileWidth, kTileHeight}});
}

template <typename T, bool kHalf>
void launch(const Conv2d& args, const Form& form, int index, int first_part, cudaStream_t stream) {
  PixelBoxes boxes{.maps = {},
                   .tiles_x = ceil_div(form.grid_width, kTileWidth),
                   .taps = form.taps,
                   .chunks = form.chunks,
                   .stride = form.stride,
                   .origin_y = form.origin_y,
                   .origin_x = form.origin_x};
  for (int i = 0; i < form.stride * form.stride; ++i)
    boxes.maps[i] = pixel_map(args, form, i / 2, i % 2);
  gemm::Problem problem{};
  problem.m = form.out_channels;
  problem.k_tiles = form.k_tiles();
  problem.m_tiles = ceil_div(form.out_channels, gemm::kBlockM);
  problem.n_tiles = boxes.tiles_x * ceil_div(form.grid_height, kBlockHeight);
  problem.half_stride = kTilePixels;
  problem.tile_stride = gemm::kBlockN;
  const ConvEpilogue<T, kHalf> epilogue{
      .form = form, .target = target_of(args, first_part), .tiles_x = boxes.tiles_x};
  const auto launch_with = [&](auto cluster_m, auto cluster_n) {
    constexpr int kClusterM = decltype(cluster_m)::value, kClusterN = decltype(cluster_n)::value;
    gemm::launch_boxes<T, kClusterM, kClusterN>(
        tensor_map(form_weights(args, index), args.dtype, form.out_channels,
                   form.k_tiles() * kChunk, gemm::kABoxRows<kClusterN>, 1),
        boxes, problem, args.workspace, epilogue, stream);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if (gemm::best_cluster(problem) == ClusterShape::k2x1)
    launch_with(two, one);
  else
    launch_with(one, two);
}

}  // namespace

int conv2d_hopper(const Conv2d& args, cudaStream_t stream) {
  check(args);
  if (args.workspace == nullptr)
    throw std::invalid_argument("conv2d_hopper: expected the workspace of fused products");
  int parts = 0;
  for (int index = 0; index < forms_of(args.kind); ++index) {
    const Form form = form_of(args, index);
    for_half_type(args.dtype, [&](auto tag) {
      using T = decltype(tag);
      if (args.output_kind == Conv2dOutput::kHalf)
        launch<T, true>(args, form, index, parts, stream);
      else
        launch<T, false>(args, form, index, parts, stream);
    });
    parts += ceil_div(form.grid_width, kTileWidth) * ceil_div(form.grid_height, kBlockHeight);
  }
  return parts;
}

}  // namespace zimage_rt
