#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "device/check.h"
#include "device/dtype.h"
#include "kernels/mma_gemm_8bit.h"
#include "kernels/numeric.cuh"
#include "kernels/quantize.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace {

// A block computes kTile x kTile of the product. Its warps, two along m, compute kTile / 2 rows and
// 32 columns each. Shared memory holds stages of 128 bytes along k, with chunks of 16 bytes
// swizzled by their row, so that ldmatrix has no bank conflicts.
constexpr int kBlockK = 128;
constexpr int kChunks = kBlockK / 16;
constexpr int kWarpColumns = 32;

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, int, float>;
template <int kTile>
constexpr int kThreads = 2 * kTile;
template <int kTile>
constexpr int kStages = kTile == 64 ? 4 : 3;
// At most 96 KB, which compute capabilities 8.6, 8.9 and 12.0 have.
template <int kTile>
constexpr int kSharedBytes = kStages<kTile> * 2 * kTile * kBlockK;

// Shared memory offset of a chunk of a tile's row.
__device__ inline std::uint32_t chunk_at(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kBlockK + ((chunk ^ (row % kChunks)) * 16));
}

// Copies rows first to first + kTile - 1 of a matrix [rows, k], columns k0 to k0 + 127; zeros
// outside of it.
template <int kTile>
__device__ inline void copy_tile(std::uint32_t to, const std::uint8_t* from, int first, int rows,
                                 int k0, int k) {
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kThreads<kTile>; ++i) {
    const int at = i * kThreads<kTile> + static_cast<int>(threadIdx.x);
    const int row = at / kChunks, chunk = at % kChunks, column = k0 + 16 * chunk;
    const bool inside = first + row < rows && column < k;
    const std::size_t offset =
        inside ? static_cast<std::size_t>(first + row) * k + static_cast<std::size_t>(column) : 0;
    cp_async_16(to + chunk_at(row, chunk), from + offset, inside);
  }
}

template <typename T, typename Out, int kTile>
__global__ void __launch_bounds__(kThreads<kTile>)
    mma_gemm_8bit_kernel(const std::uint8_t* a, const float* row_scales, const std::uint8_t* weight,
                         const float* column_scales, Out* out, int m, int n, int k, float alpha) {
// Compute capability 8.9 brought the products of float8.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  constexpr bool kRuns = std::is_same_v<T, std::int8_t>;
#else
  constexpr bool kRuns = true;
#endif
  if constexpr (kRuns) {
    extern __shared__ __align__(128) std::byte shared[];
    constexpr int kRowBlocks = kTile / 32;           // of 16 rows, per warp
    constexpr int kColumnBlocks = kWarpColumns / 8;  // of 8 columns
    constexpr int kTileBytes = kTile * kBlockK;
    constexpr int kWarpsN = kTile / kWarpColumns;
    const std::uint32_t stages = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = static_cast<int>(blockIdx.x) * kTile;
    const int first_column = static_cast<int>(blockIdx.y) * kTile;
    const int warp_row = warp / kWarpsN * (kTile / 2), warp_column = warp % kWarpsN * kWarpColumns;
    const int k_tiles = ceil_div(k, kBlockK);
    const auto load = [&](int k_tile) {
      if (k_tile < k_tiles) {
        const std::uint32_t to =
            stages + static_cast<std::uint32_t>(k_tile % kStages<kTile> * 2 * kTileBytes);
        copy_tile<kTile>(to, a, first_row, m, k_tile * kBlockK, k);
        copy_tile<kTile>(to + kTileBytes, weight, first_column, n, k_tile * kBlockK, k);
      }
      cp_async_commit();  // also a group of nothing: the waits count groups
    };
    for (int i = 0; i < kStages<kTile> - 1; ++i) load(i);

    Sum<T> sums[kRowBlocks][kColumnBlocks][4] = {};
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      cp_async_wait<kStages<kTile> - 2>();
      __syncthreads();  // also: all warps have read the stage that is loaded next
      load(k_tile + kStages<kTile> - 1);
      const std::uint32_t a_tile =
          stages + static_cast<std::uint32_t>(k_tile % kStages<kTile> * 2 * kTileBytes);
      const std::uint32_t b_tile = a_tile + kTileBytes;
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
            mma_m16n8k32(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1],
                         static_cast<const T*>(nullptr));
      }
    }

#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const int column = first_column + warp_column + 8 * j + lane % 4 * 2;
      if (column >= n) continue;
      const float2 scale = __ldg(reinterpret_cast<const float2*>(column_scales + column));
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + warp_row + 16 * i + 8 * half + lane / 4;
          if (row >= m) continue;
          const float row_scale = __ldg(row_scales + row);
          const Sum<T>* const pair = sums[i][j] + 2 * half;
          const float x = alpha * (static_cast<float>(pair[0]) * (row_scale * scale.x));
          const float y = alpha * (static_cast<float>(pair[1]) * (row_scale * scale.y));
          Out* const to = out + static_cast<std::size_t>(row) * n + column;
          if constexpr (sizeof(Out) == 4)
            *reinterpret_cast<float2*>(to) = make_float2(x, y);
          else
            *reinterpret_cast<std::uint32_t*>(to) = pack(x, y, static_cast<const Out*>(nullptr));
        }
    }
  }
}

int multiprocessors() {
  int device = 0, count = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename T, typename Out, int kTile>
void launch(const MmaGemm8bit& args, cudaStream_t stream) {
  const auto kernel = mma_gemm_8bit_kernel<T, Out, kTile>;
  // Function attributes are per device.
  static std::array<std::atomic<bool>, 64> configured{};
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  std::atomic<bool>& known = configured[static_cast<std::size_t>(device) % configured.size()];
  if (!known.load()) {
    ZRT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes<kTile>));
    known.store(true);
  }
  const dim3 blocks(static_cast<unsigned>(ceil_div(args.m, kTile)),
                    static_cast<unsigned>(ceil_div(args.n, kTile)));
  kernel<<<blocks, kThreads<kTile>, kSharedBytes<kTile>, stream>>>(
      static_cast<const std::uint8_t*>(args.a), args.row_scales,
      static_cast<const std::uint8_t*>(args.weight), args.column_scales,
      static_cast<Out*>(args.out), args.m, args.n, args.k, args.alpha);
  ZRT_LAUNCHED();
}

}  // namespace

void mma_gemm_8bit(const MmaGemm8bit& args, cudaStream_t stream) {
  if (args.k % 16 != 0 || args.n % 8 != 0)
    throw std::invalid_argument(
        "8-bit matrix product: expected a multiple of 16 as k and of 8 as n");
  if (args.m == 0) return;
  // Large tiles load less from the cache; small ones fill the device with few rows.
  const bool large =
      args.m > 64 && ceil_div(args.m, 128) * ceil_div(args.n, 128) >= multiprocessors();
  for_8bit_type(args.type, [&](auto operand) {
    for_type(args.out_type, [&](auto out) {
      using T = decltype(operand);
      using Out = decltype(out);
      large ? launch<T, Out, 128>(args, stream) : launch<T, Out, 64>(args, stream);
    });
  });
}

bool mma_gemm_8bit_runs_here(DType type) {
  cudaFuncAttributes attributes;
  ZRT_CUDA(cudaFuncGetAttributes(&attributes, mma_gemm_8bit_kernel<std::int8_t, float, 64>));
  return attributes.binaryVersion >= (type == DType::kInt8 ? 80 : 89);
}

}  // namespace zimage_rt
