#pragma once

// The kernel of the fused products: the main loop over stages in shared memory, for operands of 16
// and 8 bits.

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device/matrix.h"
#include "kernels/fused_gemm_epilogues.cuh"
#include "kernels/hopper.cuh"
#include "kernels/numeric.cuh"
#include "kernels/partial_sums.cuh"
#include "kernels/stream_k.cuh"
#include "kernels/tensor_core.cuh"
#include "kernels/tensor_map.h"

namespace zimage_rt::fused_gemm_detail {

// A block computes 128 x 256 of the product: one producer warpgroup loads shared memory, two
// consumer warpgroups multiply 64 rows each. Two blocks are a cluster that shares the operand tile
// they have in common by multicast.
constexpr int kBlockM = 128, kBlockN = 256;
constexpr int kRowBytes = kTensorMapRowBytes;
constexpr int kBox = 64;  // rows of a box, and 16-bit columns
constexpr int kBoxBytes = kBox * kRowBytes;
constexpr int kABoxes = kBlockM / kBox, kBBoxes = kBlockN / kBox;
[[maybe_unused]] constexpr int kHalfBytes = kBBoxes / 2 * kBoxBytes;  // of the weight's tile
constexpr int kStageBytes = (kABoxes + kBBoxes) * kBoxBytes;
constexpr int kStages = 4;
constexpr int kConsumerWarpgroups = kBlockM / 64;
static_assert(kConsumerWarps == 4 * kConsumerWarpgroups && kTileColumns == kBlockN);
constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);
// Flags of up to 1024 blocks, in front of the partial sums of stream-K tiles.
constexpr std::size_t kFlagBytes = 1024 * kConsumerWarpgroups * sizeof(unsigned);
// The 128-byte swizzle repeats every 1024 bytes, so stages are aligned to that.
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;

// What depends on the type of the operands, T. A stage holds 128 bytes along k of both in any type.
template <typename T>
struct Operand {
  using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, int, float>;
  static constexpr int kBlockK = kRowBytes / static_cast<int>(sizeof(T));
  // Tiles of this many rows of tiles are rasterised together: their part of `a`, 16 MB at a k of
  // 3840, stays in half of the L2 cache while the weight streams past.
  static constexpr int kRasterGroupM = 32 / static_cast<int>(sizeof(T));
};

#if ZRT_HOPPER
// One product of 32 bytes along k.
template <typename T, bool kBIsKMajor>
__device__ inline void multiply_slice(typename Operand<T>::Sum (&sums)[128], std::uint64_t a,
                                      std::uint64_t b, int add) {
  constexpr const T* kType = nullptr;
  if constexpr (sizeof(T) == 1)
    wgmma_k32<kBlockN>(sums, a, b, add, kType);
  else
    wgmma_m64n256k16<kBIsKMajor>(sums, a, b, add, kType);
}
#endif

// The second operand is a weight matrix.
template <typename T, Layout kLayout>
struct WeightBoxes {
  static constexpr bool kIsKMajor = kLayout == Layout::kOutIn;
  static_assert(sizeof(T) == 2 || kIsKMajor, "8-bit operands are K-major");
  CUtensorMap map;

#if ZRT_HOPPER
  __device__ void prefetch() const { prefetch_tensormap(&map); }
  // Half of a tile, from column `first`: 128 rows of [out, in], or two boxes of 64 columns of
  // [in, out]. Returns the map, and the box's first element in it.
  __device__ const CUtensorMap* at(int first, int k, int& x, int& y, int& z) const {
    constexpr int kBlockK = Operand<T>::kBlockK;
    x = kIsKMajor ? k * kBlockK : 0, y = kIsKMajor ? first : k * kBlockK,
    z = kIsKMajor ? 0 : first / kBox;
    return &map;
  }
#endif
};

// A cluster is kClusterM blocks along m, which share the tile of the weight, times kClusterN blocks
// along n, which share the tile of `a`: each loads its part of a shared tile and multicasts it.
// Tiles are rasterised along m first, so that the weight is read once and `a` stays in the cache.
// `Boxes` says where the second operand's boxes are.
template <typename T, typename Epilogue, int kClusterM, int kClusterN, typename Boxes>
__global__ void __cluster_dims__(kClusterM* kClusterN, 1, 1) __launch_bounds__(kThreads, 1)
    fused_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ Boxes b_boxes, const Problem problem,
                      const Epilogue epilogue) {
#if ZRT_HOPPER
  extern __shared__ std::byte shared[];
  const std::uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const std::uint32_t full = stages + kStages * kStageBytes, empty = full + kStages * 8;
  constexpr int kCluster = kClusterM * kClusterN;
  constexpr bool kBIsKMajor = Boxes::kIsKMajor;
  constexpr int kBlockK = Operand<T>::kBlockK;
  // The blocks that exchange operands with this one: itself and its neighbours along m and n.
  constexpr int kPartners = kClusterM + kClusterN - 1;
  const int rank = static_cast<int>(cluster_rank());
  const int cluster_m = rank / kClusterN, cluster_n = rank % kClusterN;
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, kPartners * kConsumerWarpgroups);
    }
    fence_mbarrier_init();
    prefetch_tensormap(&a_map);
    b_boxes.prefetch();
  }
  cluster_arrive();
  cluster_wait();

  const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
  const auto tile_origin = [&](int tile, int& row, int& column) {
    const int group_index = tile / (problem.raster_group * problem.n_steps);
    const int height =
        min(problem.raster_group, problem.m_steps - group_index * problem.raster_group);
    const int step = tile - group_index * problem.raster_group * problem.n_steps;
    const int m_step = group_index * problem.raster_group + step % height, n_step = step / height;
    row = kBlockM * (kClusterM * m_step + cluster_m);
    column = problem.tile_stride * (kClusterN * n_step + cluster_n);
  };
  StreamKScheduler scheduler(problem, cluster, clusters);
  WorkUnit unit;

  if (group == 0) {
    warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 0) {
      std::uint16_t whole_row = 0, whole_column = 0;  // of the cluster, as masks
      for (int i = 0; i < kClusterN; ++i) whole_row |= 1u << (cluster_m * kClusterN + i);
      for (int i = 0; i < kClusterM; ++i) whole_column |= 1u << (i * kClusterN + cluster_n);
      std::uint32_t stage = 0, parity = 1;
      while (scheduler.next(unit)) {
        int row, column;
        tile_origin(unit.tile, row, column);
        for (int k = unit.begin; k < unit.end; ++k) {
          mbarrier_wait(empty + 8 * stage, parity);
          const std::uint32_t barrier = full + 8 * stage;
          const std::uint32_t a = stages + stage * kStageBytes, b = a + kABoxes * kBoxBytes;
          mbarrier_arrive_expect_tx(barrier, kStageBytes);
          if (kClusterN == 1)
            tma_load_3d(a, &a_map, k * kBlockK, row, 0, barrier);
          else
            tma_load_3d_multicast(a + cluster_n * kBoxBytes, &a_map, k * kBlockK,
                                  row + cluster_n * kBox, 0, barrier, whole_row);
          for (int half = 0; half < 2; ++half) {
            if (kClusterM == 2 && half != cluster_m) continue;
            int x, y, z;
            const CUtensorMap* const map =
                b_boxes.at(column + half * problem.half_stride, k, x, y, z);
            const std::uint32_t to = b + half * kHalfBytes;
            if (kClusterM == 1)
              tma_load_3d(to, map, x, y, z, barrier);
            else
              tma_load_3d_multicast(to, map, x, y, z, barrier, whole_column);
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();  // the cluster barrier is .aligned: it needs whole warps
  } else {
    warpgroup_reg_alloc<232>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, in_group = threadIdx.x % 128;
    const std::uint64_t a_tile = make_smem_descriptor(stages + (group - 1) * kBoxBytes, 0, 1024);
    const std::uint64_t b_tile =
        make_smem_descriptor(stages + kABoxes * kBoxBytes, kBIsKMajor ? 0 : kBoxBytes, 1024);
    constexpr int kBStep = kBIsKMajor ? 32 : 16 * kRowBytes;  // bytes between slices along k
    typename Operand<T>::Sum sums[128];
    std::uint32_t stage = 0, parity = 0;
    const auto release_stage = [&](std::uint32_t which) {
      if (in_group >= kPartners) return;
      const int other = in_group - kClusterN;  // among the blocks of other rows
      const int partner = in_group < kClusterN
                              ? cluster_m * kClusterN + in_group
                              : (other + (other >= cluster_m)) * kClusterN + cluster_n;
      mbarrier_arrive_remote(empty + 8 * which, partner);
    };
    const auto slot = [&](int of) {
      return (kCluster * of + rank) * kConsumerWarpgroups + group - 1;
    };
    const auto partials = [&](int of) {
      return problem.partials + static_cast<std::size_t>(slot(of)) * 32 * 128 + in_group;
    };
    const auto thread_tile = [&](int row, int column) {
      return ThreadTile{
          .m = problem.m, .row = row + 16 * warp + lane / 4, .column = column, .t = lane % 4};
    };
    while (scheduler.next(unit)) {
      if constexpr (requires { epilogue.begin(thread_tile(0, 0)); }) {
        int row, column;
        tile_origin(unit.tile, row, column);
        if (unit.begin == 0) epilogue.begin(thread_tile(row + (group - 1) * 64, column));
      }
      std::uint32_t before = 0;
      for (int k = unit.begin; k < unit.end; ++k) {
        mbarrier_wait(full + 8 * stage, parity);
        // A descriptor's address counts units of 16 bytes; the sum never carries out of its field.
        const std::uint64_t shift = stage * (kStageBytes >> 4);
        warpgroup_arrive();
#pragma unroll
        for (int part = 0; part < kRowBytes / 32; ++part)
          multiply_slice<T, kBIsKMajor>(sums, a_tile + shift + part * (32 >> 4),
                                        b_tile + shift + part * (kBStep >> 4),
                                        k > unit.begin || part > 0);
        warpgroup_commit_batch();
        // With one group in flight, the products of the previous stage are complete.
        warpgroup_wait<1>();
        if (k > unit.begin) release_stage(before);
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      int row, column;
      tile_origin(unit.tile, row, column);
      row += (group - 1) * 64;
      const ThreadTile here = thread_tile(row, column);
      const typename Epilogue::Prefetched prefetched = epilogue.prefetch(here);
      warpgroup_wait<0>();
      release_stage(before);
      if (row >= problem.m) continue;
      if (unit.begin > 0) {
        uint4* const to = partials(cluster);
#pragma unroll
        for (int i = 0; i < 32; ++i) __stcg(to + i * 128, to_partial(sums + 4 * i));
        __threadfence();
        named_barrier_sync(group);
        if (in_group == 0) store_release(problem.flags + slot(cluster), 1);
        continue;
      }
      // Add the partial sums of the following clusters, always in the same order.
      const int tile_end = (unit.tile - problem.data_parallel_tiles + 1) * problem.k_tiles;
      for (int of = cluster + 1;
           unit.end < problem.k_tiles && StreamKScheduler::first(problem, of, clusters) < tile_end;
           ++of) {
        if (in_group == 0)
          while (load_acquire(problem.flags + slot(of)) == 0) {
          }
        named_barrier_sync(group);
        const uint4* const from = partials(of);
#pragma unroll
        for (int i = 0; i < 32; ++i) add_partial(sums + 4 * i, __ldcg(from + i * 128));
        named_barrier_sync(group);
        // Reset for the next launch.
        if (in_group == 0) store_release(problem.flags + slot(of), 0);
      }
      epilogue(sums, prefetched, here);
    }
  }
  // Peers may still write to this block's shared memory, or arrive at its barriers.
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace zimage_rt::fused_gemm_detail
