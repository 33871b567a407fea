#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "kernels/early_start.cuh"
#include "kernels/mma_gemm_8bit.h"
#include "kernels/numeric.cuh"
#include "kernels/partial_sums.cuh"
#include "kernels/quantize.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace {

// A block computes kBlockM x 128 of the product. Its warps, two along m, compute kBlockM / 2 rows
// and 32 columns each. Shared memory holds stages of 128 bytes along k, with chunks of 16 bytes
// swizzled by their row, so that ldmatrix has no bank conflicts.
constexpr int kBlockN = 128, kBlockK = 128;
constexpr int kChunks = kBlockK / 16;
constexpr int kWarpColumns = 32;
constexpr int kThreads = 2 * kBlockN;

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, int, float>;
template <int kBlockM>
constexpr int kStages = kBlockM == 64 ? 4 : 3;
// 96 KB, which compute capabilities 8.6, 8.9 and 12.0 have.
template <int kBlockM>
constexpr int kSharedBytes = kStages<kBlockM> * (kBlockM + kBlockN) * kBlockK;

// With few rows, several blocks compute a tile, each a part of k, and add their sums through memory
// that stays in the caches.
constexpr int kSplitRows = 64;  // of such a tile
constexpr int kSplits = 8;      // at most: one block reads all of their sums
constexpr int kSplitTiles = 3;  // at least, of kBlockK, so that loads overlap
constexpr int kResident = 2;    // blocks per multiprocessor
constexpr std::size_t kPartialBytes = std::size_t{4} * kSplitRows * kBlockN;
constexpr std::size_t kCounterBytes = 4096;  // of tiles, in front of the partial sums

// Shared memory offset of a chunk of a tile's row.
__device__ inline std::uint32_t chunk_at(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kBlockK + ((chunk ^ (row % kChunks)) * 16));
}

// Copies rows first to first + kRows - 1 of a matrix [rows, k], columns k0 to k0 + 127; zeros
// outside of it.
template <int kRows>
__device__ inline void copy_tile(std::uint32_t to, const std::uint8_t* from, int first, int rows,
                                 int k0, int k) {
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = at / kChunks, chunk = at % kChunks, column = k0 + 16 * chunk;
    const bool inside = first + row < rows && column < k;
    const std::size_t offset =
        inside ? static_cast<std::size_t>(first + row) * k + static_cast<std::size_t>(column) : 0;
    cp_async_16(to + chunk_at(row, chunk), from + offset, inside);
  }
}

// Adds up the sums of the gridDim.z blocks of a tile in the order of k. Returns whether this block
// is the last one, which has the whole sums.
template <int kCount, typename S>
__device__ inline bool join_splits(S (&sums)[kCount][4], uint4* partials, unsigned* counters) {
  __shared__ bool last;
  const unsigned splits = gridDim.z;
  const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x;
  uint4* const own = partials + std::size_t{tile} * splits * kCount * kThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    __stcg(own + (blockIdx.z * kCount + i) * kThreads, to_partial(sums[i]));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counters + tile, 1u) == splits - 1;
    if (last) counters[tile] = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  if (!last) return false;
#pragma unroll
  for (auto& four : sums)
#pragma unroll
    for (S& sum : four) sum = 0;
#pragma unroll 2
  for (unsigned split = 0; split < splits; ++split)
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      add_partial(sums[i], __ldcg(own + (split * kCount + i) * kThreads));
  return true;
}

// Grid: x iterates over tiles of rows, y of columns, z over splits of k.
template <typename T, typename Out, int kBlockM>
__global__ void __launch_bounds__(kThreads)
    mma_gemm_8bit_kernel(const std::uint8_t* a, const float* row_scales, const std::uint8_t* weight,
                         const float* column_scales, Out* out, int m, int n, int k, float alpha,
                         uint4* partials, unsigned* counters) {
// Compute capability 8.9 brought the products of float8.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  constexpr bool kRuns = std::is_same_v<T, std::int8_t>;
#else
  constexpr bool kRuns = true;
#endif
  if constexpr (kRuns) {
    extern __shared__ __align__(128) std::byte shared[];
    constexpr int kRowBlocks = kBlockM / 32;         // of 16 rows, per warp
    constexpr int kColumnBlocks = kWarpColumns / 8;  // of 8 columns
    constexpr int kABytes = kBlockM * kBlockK, kStageBytes = kABytes + kBlockN * kBlockK;
    constexpr int kWarpsN = kBlockN / kWarpColumns;
    const std::uint32_t stages = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = static_cast<int>(blockIdx.x) * kBlockM;
    const int first_column = static_cast<int>(blockIdx.y) * kBlockN;
    const int warp_row = warp / kWarpsN * (kBlockM / 2);
    const int warp_column = warp % kWarpsN * kWarpColumns;
    const int all_tiles = ceil_div(k, kBlockK), splits = static_cast<int>(gridDim.z);
    const int first_tile = all_tiles * static_cast<int>(blockIdx.z) / splits;
    const int k_tiles = all_tiles * static_cast<int>(blockIdx.z + 1) / splits - first_tile;
    const auto stage_of = [&](int k_tile) {
      return stages + static_cast<std::uint32_t>(k_tile % kStages<kBlockM> * kStageBytes);
    };
    const auto load_weight = [&](int k_tile) {
      if (k_tile < k_tiles)
        copy_tile<kBlockN>(stage_of(k_tile) + kABytes, weight, first_column, n,
                           (first_tile + k_tile) * kBlockK, k);
    };
    const auto load_a = [&](int k_tile) {
      if (k_tile < k_tiles)
        copy_tile<kBlockM>(stage_of(k_tile), a, first_row, m, (first_tile + k_tile) * kBlockK, k);
      cp_async_commit();  // also a group of nothing: the waits count groups
    };
    for (int i = 0; i < kStages<kBlockM> - 1; ++i) load_weight(i);
    wait_for_previous_kernel();
    for (int i = 0; i < kStages<kBlockM> - 1; ++i) load_a(i);

    constexpr int kSums = kRowBlocks * kColumnBlocks;
    Sum<T> sums[kSums][4] = {};
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      cp_async_wait<kStages<kBlockM> - 2>();
      __syncthreads();  // also: all warps have read the stage that is loaded next
      load_weight(k_tile + kStages<kBlockM> - 1);
      load_a(k_tile + kStages<kBlockM> - 1);
      const std::uint32_t a_tile = stage_of(k_tile), b_tile = a_tile + kABytes;
#pragma unroll
      for (int slice = 0; slice < kBlockK / 32; ++slice) {
        std::uint32_t left[kRowBlocks][4], right[kColumnBlocks / 2][4];
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
          ldmatrix_x4(a_tile + chunk_at(warp_row + 16 * i + lane % 16, 2 * slice + lane / 16),
                      left[i]);
#pragma unroll
        for (int j = 0; j < kColumnBlocks / 2; ++j)
          ldmatrix_x4(b_tile + chunk_at(warp_column + 16 * j + lane % 8 + lane / 16 * 8,
                                        2 * slice + lane / 8 % 2),
                      right[j]);
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
          for (int j = 0; j < kColumnBlocks; ++j)
            mma_m16n8k32(sums[i * kColumnBlocks + j], left[i], right[j / 2][j % 2 * 2],
                         right[j / 2][j % 2 * 2 + 1], static_cast<const T*>(nullptr));
      }
    }

    // Four sums: two rows, eight apart, of two columns.
    const auto store = [&](int index, const Sum<T>(&four)[4]) {
      const int column = first_column + warp_column + 8 * (index % kColumnBlocks) + lane % 4 * 2;
      if (column >= n) return;
      const float2 scale = __ldg(reinterpret_cast<const float2*>(column_scales + column));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_row + 16 * (index / kColumnBlocks) + 8 * half + lane / 4;
        if (row >= m) continue;
        const float row_scale = row_scales[row];
        const float x = alpha * (static_cast<float>(four[2 * half]) * (row_scale * scale.x));
        const float y = alpha * (static_cast<float>(four[2 * half + 1]) * (row_scale * scale.y));
        Out* const to = out + static_cast<std::size_t>(row) * n + column;
        if constexpr (sizeof(Out) == 4)
          *reinterpret_cast<float2*>(to) = make_float2(x, y);
        else
          *reinterpret_cast<std::uint32_t*>(to) = pack(x, y, static_cast<const Out*>(nullptr));
      }
    };
    if (splits > 1 && !join_splits(sums, partials, counters)) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) store(i, sums[i]);
  }
}

// The number of blocks per tile, so that all blocks run at once.
int splits_of(const Gemm8bit& args, int tiles) {
  const int fitting =
      std::min(kResident * multiprocessors() / tiles, ceil_div(args.k, kBlockK) / kSplitTiles);
  int splits = 1;
  while (splits < kSplits && 2 * splits <= fitting) splits *= 2;
  return splits;
}

template <typename T, typename Out, int kBlockM>
void launch(const Gemm8bit& args, int splits, cudaStream_t stream) {
  const auto kernel = mma_gemm_8bit_kernel<T, Out, kBlockM>;
  // Function attributes are per device.
  static std::array<std::atomic<bool>, 64> configured{};
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  std::atomic<bool>& known = configured[static_cast<std::size_t>(device) % configured.size()];
  if (!known.load()) {
    ZRT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes<kBlockM>));
    known.store(true);
  }
  const dim3 blocks(static_cast<unsigned>(ceil_div(args.m, kBlockM)),
                    static_cast<unsigned>(ceil_div(args.n, kBlockN)),
                    static_cast<unsigned>(splits));
  auto* const workspace = static_cast<std::byte*>(args.workspace);
  launch_early(kernel, blocks, kThreads, kSharedBytes<kBlockM>, 1, stream,
               static_cast<const std::uint8_t*>(args.a), args.row_scales,
               static_cast<const std::uint8_t*>(args.weight), args.column_scales,
               static_cast<Out*>(args.out), args.m, args.n, args.k, args.alpha,
               splits > 1 ? reinterpret_cast<uint4*>(workspace + kCounterBytes) : nullptr,
               reinterpret_cast<unsigned*>(workspace));
}

}  // namespace

std::size_t mma_gemm_8bit_workspace_bytes() {
  return kCounterBytes + kPartialBytes * kResident * static_cast<std::size_t>(multiprocessors());
}

void mma_gemm_8bit(const Gemm8bit& args, cudaStream_t stream) {
  if (args.k % 16 != 0 || args.n % 8 != 0)
    throw std::invalid_argument(
        "8-bit matrix product: expected a multiple of 16 as k and of 8 as n");
  if (args.m == 0) return;
  // Large tiles load less from the cache; small ones fill the device with few rows.
  const int columns = ceil_div(args.n, kBlockN), tiles = ceil_div(args.m, kSplitRows) * columns;
  const bool large = args.m > kSplitRows && ceil_div(args.m, 128) * columns >= multiprocessors();
  const bool splits =
      args.workspace != nullptr && !large && tiles * sizeof(unsigned) <= kCounterBytes;
  for_8bit_type(args.type, [&](auto operand) {
    for_type(args.out_type, [&](auto out) {
      using T = decltype(operand);
      using Out = decltype(out);
      large ? launch<T, Out, 128>(args, 1, stream)
            : launch<T, Out, kSplitRows>(args, splits ? splits_of(args, tiles) : 1, stream);
    });
  });
}

bool mma_gemm_8bit_runs_here(DType type) {
  cudaFuncAttributes attributes;
  ZRT_CUDA(cudaFuncGetAttributes(&attributes, mma_gemm_8bit_kernel<std::int8_t, float, 64>));
  return attributes.binaryVersion >= (type == DType::kInt8 ? 80 : 89);
}

}  // namespace zimage_rt
