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
#include "kernels/few_rows_gemm_8bit.h"
#include "kernels/hopper.cuh"
#include "kernels/numeric.cuh"
#include "kernels/partial_sums.cuh"
#include "kernels/quantize.cuh"
#include "kernels/tensor_core.cuh"
#include "kernels/tensor_map.h"

namespace zimage_rt {
namespace {

// The transpose of the product: 128 columns are the rows of a tile, up to 128 rows its columns.
// Blocks of a cluster along z compute a part of k each, and add their sums through shared memory.
// Two consumer warpgroups multiply 64 columns each; a warp behind them loads the stages.
constexpr int kBlockColumns = 128;
constexpr int kConsumerThreads = 256;
constexpr int kThreads = kConsumerThreads + 32;
constexpr int kWeightBytes = kBlockColumns * kTensorMapRowBytes;
constexpr int kResident = 2;      // blocks per multiprocessor
constexpr int kClusterLimit = 8;  // of blocks, on any device
constexpr int kSplitStages = 3;   // at least, so that loads overlap
// Sums in shared memory, [rows, kSumStride]: without bank conflicts, and at 16 bytes.
constexpr int kSumStride = kBlockColumns + 4;

template <int kRows>
struct Tile {
  static constexpr int stages = kRows < 128 ? 4 : 3;
  static constexpr int stage_bytes = kWeightBytes + kRows * kTensorMapRowBytes;
  // Stages are aligned to the swizzle's period of 1024 bytes.
  static constexpr int shared_bytes = stages * stage_bytes + 1024 + 2 * stages * 8;
  static_assert(kRows * kSumStride * 4 <= stages * stage_bytes);
};

template <typename T, typename Out, int kRows>
__global__ void __launch_bounds__(kThreads, kResident)
    few_rows_gemm_8bit_kernel(const __grid_constant__ CUtensorMap a_map,
                              const __grid_constant__ CUtensorMap weight_map,
                              const float* row_scales, const float* column_scales, Out* out, int m,
                              int n, int k, float alpha) {
#if ZRT_HOPPER
  using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, int, float>;
  constexpr int kStages = Tile<kRows>::stages, kStageBytes = Tile<kRows>::stage_bytes;
  extern __shared__ std::byte shared[];
  const std::uint32_t start = shared_address(shared), stages = (start + 1023) & ~1023u;
  const std::uint32_t full = stages + kStages * kStageBytes, empty = full + kStages * 8;
  const int first_row = static_cast<int>(blockIdx.x) * kRows;
  const int first_column = static_cast<int>(blockIdx.y) * kBlockColumns;
  const int splits = static_cast<int>(gridDim.z), split = static_cast<int>(blockIdx.z);
  const int all_steps = ceil_div(k, kTensorMapRowBytes);
  const int first = all_steps * split / splits, last = all_steps * (split + 1) / splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, kConsumerThreads / 128);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  allow_early_start();

  if (threadIdx.x >= kConsumerThreads) {
    if (threadIdx.x == kConsumerThreads) {
      const auto load_weight = [&](int step, int stage) {
        mbarrier_arrive_expect_tx(full + 8 * stage, kStageBytes);
        tma_load_3d(stages + stage * kStageBytes, &weight_map, step * kTensorMapRowBytes,
                    first_column, 0, full + 8 * stage);
      };
      const auto load_a = [&](int step, int stage) {
        tma_load_3d(stages + stage * kStageBytes + kWeightBytes, &a_map, step * kTensorMapRowBytes,
                    first_row, 0, full + 8 * stage);
      };
      const int early = min(kStages, last - first);
      for (int i = 0; i < early; ++i) load_weight(first + i, i);
      wait_for_previous_kernel();
      for (int i = 0; i < early; ++i) load_a(first + i, i);
      int stage = 0;
      std::uint32_t parity = 0;
      for (int step = first + early; step < last; ++step) {
        mbarrier_wait(empty + 8 * stage, parity);
        load_weight(step, stage);
        load_a(step, stage);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();  // the cluster barrier is .aligned: it needs whole warps
    if (splits > 1) {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    wait_for_previous_kernel();
    const int group = static_cast<int>(threadIdx.x) / 128,
              lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint64_t weight_tile =
        make_smem_descriptor(stages + group * kWeightBytes / 2, 0, 1024);
    const std::uint64_t a_tile = make_smem_descriptor(stages + kWeightBytes, 0, 1024);
    Sum sums[kRows / 2];
    int stage = 0, before = 0;
    std::uint32_t parity = 0;
    for (int step = first; step < last; ++step) {
      mbarrier_wait(full + 8 * stage, parity);
      // A descriptor's address counts units of 16 bytes.
      const std::uint64_t shift = static_cast<std::uint64_t>(stage) * (kStageBytes >> 4);
      warpgroup_arrive();
#pragma unroll
      for (int part = 0; part < kTensorMapRowBytes / 32; ++part)
        wgmma_k32<kRows>(sums, weight_tile + shift + part * (32 >> 4),
                         a_tile + shift + part * (32 >> 4), step > first || part > 0,
                         static_cast<const T*>(nullptr));
      warpgroup_commit_batch();
      // With one group in flight, the products of the previous stage are complete.
      warpgroup_wait<1>();
      if (step > first && threadIdx.x % 128 == 0) mbarrier_arrive(empty + 8 * before);
      before = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    warpgroup_wait<0>();

    // All loads are complete, and the stages are free for the sums [rows, columns].
    named_barrier_sync<kConsumerThreads>(1);
    Sum* const own = reinterpret_cast<Sum*>(shared + (stages - start));
    const int column = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        own[(8 * j + lane % 4 * 2 + i % 2) * kSumStride + column + 8 * (i / 2)] = sums[4 * j + i];
    if (splits > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      named_barrier_sync<kConsumerThreads>(1);
    }
    // A block of the cluster stores some of the rows: four columns per thread.
    const int rows = min(m - first_row, kRows), per_block = ceil_div(rows, splits);
    const int row_end = min(rows, per_block * (split + 1));
    const int four = first_column + lane * 4;
    if (four < n) {
      const float4 scale = *reinterpret_cast<const float4*>(column_scales + four);
      for (int row = per_block * split + static_cast<int>(threadIdx.x) / 32; row < row_end;
           row += kConsumerThreads / 32) {
        const std::uint32_t at = shared_address(own + row * kSumStride + lane * 4);
        Sum whole[4] = {};
#pragma unroll 4
        for (int block = 0; block < splits; ++block)
          add_partial(whole, load_cluster_16(at, static_cast<std::uint32_t>(block)));
        const float factor = row_scales[first_row + row];
        const float values[4] = {alpha * (static_cast<float>(whole[0]) * (factor * scale.x)),
                                 alpha * (static_cast<float>(whole[1]) * (factor * scale.y)),
                                 alpha * (static_cast<float>(whole[2]) * (factor * scale.z)),
                                 alpha * (static_cast<float>(whole[3]) * (factor * scale.w))};
        Out* const to = out + static_cast<std::size_t>(first_row + row) * n + four;
        if constexpr (sizeof(Out) == 4)
          *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
        else
          *reinterpret_cast<uint2*>(to) =
              make_uint2(pack(values[0], values[1], static_cast<const Out*>(nullptr)),
                         pack(values[2], values[3], static_cast<const Out*>(nullptr)));
      }
    }
  }
  // A block's shared memory must outlive the reads of its peers.
  if (splits > 1) {
    cluster_arrive();
    cluster_wait();
  }
#endif
}

// The number of blocks per tile, so that all blocks run at once.
int splits_of(int tiles, int steps) {
  const int fitting = std::min(kResident * multiprocessors() / tiles, steps / kSplitStages);
  int splits = 1;
  while (splits < kClusterLimit && 2 * splits <= fitting) splits *= 2;
  return splits;
}

template <typename T, typename Out, int kRows>
void launch(const Gemm8bit& args, cudaStream_t stream) {
  const auto kernel = few_rows_gemm_8bit_kernel<T, Out, kRows>;
  // Function attributes are per device.
  static std::array<std::atomic<bool>, 64> configured{};
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  std::atomic<bool>& known = configured[static_cast<std::size_t>(device) % configured.size()];
  if (!known.load()) {
    ZRT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Tile<kRows>::shared_bytes));
    known.store(true);
  }
  // Tiles of the same columns are neighbours, which read the weight at the same time.
  dim3 blocks(static_cast<unsigned>(ceil_div(args.m, kRows)),
              static_cast<unsigned>(ceil_div(args.n, kBlockColumns)));
  blocks.z = static_cast<unsigned>(
      splits_of(static_cast<int>(blocks.x * blocks.y), ceil_div(args.k, kTensorMapRowBytes)));
  launch_early(kernel, blocks, kThreads, Tile<kRows>::shared_bytes, blocks.z, stream,
               tensor_map(args.a, args.type, args.m, args.k, kRows, 1),
               tensor_map(args.weight, args.type, args.n, args.k, kBlockColumns, 1),
               args.row_scales, args.column_scales, static_cast<Out*>(args.out), args.m, args.n,
               args.k, args.alpha);
}

}  // namespace

void few_rows_gemm_8bit(const Gemm8bit& args, cudaStream_t stream) {
  if (args.m > kFewRows || args.k % 16 != 0 || args.n % 8 != 0)
    throw std::invalid_argument(
        "8-bit matrix product of few rows: expected at most 256 rows, a multiple of 16 as k and of "
        "8 as n");
  if (args.m == 0) return;
  for_8bit_type(args.type, [&](auto operand) {
    for_type(args.out_type, [&](auto out) {
      using T = decltype(operand);
      using Out = decltype(out);
      if (args.m <= 32)
        launch<T, Out, 32>(args, stream);
      else if (args.m <= 64)
        launch<T, Out, 64>(args, stream);
      else
        launch<T, Out, 128>(args, stream);
    });
  });
}

}  // namespace zimage_rt
