#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/fused_gemm.h"
#include "kernels/fused_gemm_epilogues.cuh"
#include "kernels/hopper.cuh"
#include "kernels/numeric.cuh"
#include "kernels/stream_k.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace {

using namespace fused_gemm_detail;

// A block computes 128 x 256 of the product: one producer warpgroup loads shared memory, two
// consumer warpgroups multiply 64 rows each. Two blocks are a cluster that shares the operand tile
// they have in common by multicast.
constexpr int kBlockM = 128, kBlockN = 256, kBlockK = 64;
constexpr int kBox = 64;  // columns of a TMA box: 128 bytes, the widest swizzle
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kABoxes = kBlockM / kBox, kBBoxes = kBlockN / kBox;
[[maybe_unused]] constexpr int kHalfBytes = kBBoxes / 2 * kBoxBytes;  // of the weight's tile
constexpr int kStageBytes = (kABoxes + kBBoxes) * kBoxBytes;
constexpr int kStages = 4;
// Tiles of this many rows of tiles are rasterised together: their part of `a`, 16 MB at a k of
// 3840, stays in half of the L2 cache while the weight streams past.
constexpr int kRasterGroupM = 16;
constexpr int kConsumerWarpgroups = kBlockM / 64;
constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);
// Flags of up to 1024 blocks, in front of the partial sums of stream-K tiles.
constexpr std::size_t kFlagBytes = 1024 * kConsumerWarpgroups * sizeof(unsigned);
// The 128-byte swizzle repeats every 1024 bytes, so stages are aligned to that.
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;

// A cluster is kClusterM blocks along m, which share the tile of the weight, times kClusterN blocks
// along n, which share the tile of `a`: each loads its part of a shared tile and multicasts it.
// Tiles are rasterised along m first, so that the weight is read once and `a` stays in the cache.
template <typename T, typename Epilogue, int kClusterM, int kClusterN, Layout kLayout>
__global__ void __cluster_dims__(kClusterM* kClusterN, 1, 1) __launch_bounds__(kThreads, 1)
    fused_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map, const Problem problem,
                      const Epilogue epilogue) {
#if ZRT_HOPPER
  extern __shared__ std::byte shared[];
  const std::uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const std::uint32_t full = stages + kStages * kStageBytes, empty = full + kStages * 8;
  constexpr int kCluster = kClusterM * kClusterN;
  constexpr bool kOutIn = kLayout == Layout::kOutIn;
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
    prefetch_tensormap(&b_map);
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
        // Half of the weight's tile: 128 rows of [out, in], or two boxes of 64 columns of [in,
        // out].
        const auto half_at = [&](int half, int k, int& x, int& y, int& z) {
          const int first = column + half * problem.half_stride;
          x = kOutIn ? k * kBlockK : 0, y = kOutIn ? first : k * kBlockK,
          z = kOutIn ? 0 : first / kBox;
        };
        for (int k = unit.begin; k < unit.end; ++k) {
          mbarrier_wait(empty + 8 * stage, parity);
          const std::uint32_t barrier = full + 8 * stage;
          const std::uint32_t a = stages + stage * kStageBytes, b = a + kABoxes * kBoxBytes;
          mbarrier_arrive_expect_tx(barrier, kStageBytes);
          int x, y, z;
          if (kClusterN == 1)
            tma_load_3d(a, &a_map, k * kBlockK, row, 0, barrier);
          else
            tma_load_3d_multicast(a + cluster_n * kBoxBytes, &a_map, k * kBlockK,
                                  row + cluster_n * kBox, 0, barrier, whole_row);
          for (int half = 0; half < 2; ++half) {
            if (kClusterM == 2 && half != cluster_m) continue;
            half_at(half, k, x, y, z);
            const std::uint32_t to = b + half * kHalfBytes;
            if (kClusterM == 1)
              tma_load_3d(to, &b_map, x, y, z, barrier);
            else
              tma_load_3d_multicast(to, &b_map, x, y, z, barrier, whole_column);
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
        make_smem_descriptor(stages + kABoxes * kBoxBytes, kOutIn ? 0 : kBoxBytes, 1024);
    constexpr int kBStep = kOutIn ? 32 : 16 * 128;  // bytes between slices of 16 along k
    float sums[128];
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
    while (scheduler.next(unit)) {
      std::uint32_t before = 0;
      for (int k = unit.begin; k < unit.end; ++k) {
        mbarrier_wait(full + 8 * stage, parity);
        // A descriptor's address counts units of 16 bytes; the sum never carries out of its field.
        const std::uint64_t shift = stage * (kStageBytes >> 4);
        warpgroup_arrive();
#pragma unroll
        for (int part = 0; part < kBlockK / 16; ++part)
          wgmma_m64n256k16<kOutIn>(sums, a_tile + shift + part * (32 >> 4),
                                   b_tile + shift + part * (kBStep >> 4),
                                   k > unit.begin || part > 0, static_cast<const T*>(nullptr));
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
      const ThreadTile here{
          .m = problem.m, .row = row + 16 * warp + lane / 4, .column = column, .t = lane % 4};
      const typename Epilogue::Prefetched prefetched = epilogue.prefetch(here);
      warpgroup_wait<0>();
      release_stage(before);
      if (row >= problem.m) continue;
      if (unit.begin > 0) {
        float4* const to = partials(cluster);
#pragma unroll
        for (int i = 0; i < 32; ++i)
          __stcg(to + i * 128,
                 make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
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
        const float4* const from = partials(of);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const float4 more = __ldcg(from + i * 128);
          sums[4 * i] += more.x, sums[4 * i + 1] += more.y;
          sums[4 * i + 2] += more.z, sums[4 * i + 3] += more.w;
        }
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

// The TMA descriptor of a row-major matrix. A load copies `box_rows` rows of `boxes` neighbouring
// strips of 64 columns, which are consecutive in shared memory.
CUtensorMap tensor_map(const void* data, DType type, int rows, int columns, int box_rows,
                       int boxes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    ZRT_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw CudaError("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&::cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const auto wide = [](auto value) { return static_cast<cuuint64_t>(value); };
  // A load of a single box needs no third dimension: the strip is the whole matrix.
  const bool stripped = boxes > 1;
  const cuuint64_t size[] = {wide(stripped ? kBox : columns), wide(rows),
                             wide(stripped ? columns / kBox : 1)};
  const cuuint64_t stride[] = {wide(columns) * size_of(type), wide(kBox) * size_of(type)};
  const cuuint32_t box[] = {kBox, static_cast<cuuint32_t>(box_rows),
                            static_cast<cuuint32_t>(boxes)};
  const cuuint32_t one[] = {1, 1, 1};
  const CUresult status = encode(
      &map,
      type == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, const_cast<void*>(data), size, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw CudaError("cuTensorMapEncodeTiled failed with status " + std::to_string(status));
  return map;
}

// The number of clusters of a kernel that are resident at once on the current device. Clusters of
// stream-K tiles wait for one another, so a launch must not have more.
template <typename T, int kClusterM, int kClusterN, Layout kLayout, typename Epilogue>
int resident_clusters() {
  constexpr int kCluster = kClusterM * kClusterN;
  const auto kernel = fused_gemm_kernel<T, Epilogue, kClusterM, kClusterN, kLayout>;
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  std::atomic<int>& clusters = known[static_cast<std::size_t>(device) % known.size()];
  if (clusters.load() == 0) {
    ZRT_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    int count = 0;
    ZRT_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(count / kCluster * kCluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
    int most = 0;
    ZRT_CUDA(cudaOccupancyMaxActiveClusters(&most, kernel, &config));
    clusters.store(std::min(most, count / kCluster));
  }
  return clusters.load();
}

template <typename T, int kClusterM, int kClusterN, Layout kLayout, typename Epilogue>
void launch(const FusedGemm& args, Problem problem, const Epilogue& epilogue, cudaStream_t stream) {
  const auto kernel = fused_gemm_kernel<T, Epilogue, kClusterM, kClusterN, kLayout>;
  problem.m_steps = ceil_div(problem.m_tiles, kClusterM);
  problem.n_steps = ceil_div(problem.n_tiles, kClusterN);
  const int group = kRasterGroupM / kClusterM;
  problem.raster_group =
      ceil_div(problem.m_steps, std::max(1, (problem.m_steps + group / 2) / group));
  const int tiles = problem.m_steps * problem.n_steps;
  const int clusters = std::min(tiles * problem.k_tiles,
                                resident_clusters<T, kClusterM, kClusterN, kLayout, Epilogue>());
  // The last full wave is split together with the tiles that remain.
  problem.data_parallel_tiles =
      tiles % clusters == 0 ? tiles : std::max(0, tiles / clusters - 1) * clusters;
  problem.stream_k_tiles = tiles - problem.data_parallel_tiles;
  problem.flags = static_cast<unsigned*>(args.workspace);
  problem.partials =
      reinterpret_cast<float4*>(static_cast<std::byte*>(args.workspace) + kFlagBytes);
  kernel<<<clusters * kClusterM * kClusterN, kThreads, kSharedBytes, stream>>>(
      tensor_map(args.a, args.type, args.m, args.k, kClusterN == 1 ? kBlockM : kBox, 1),
      kLayout == Layout::kOutIn
          ? tensor_map(args.weight, args.type, args.n, args.k, kBlockN / 2, 1)
          : tensor_map(args.weight, args.type, args.k, args.n, kBlockK, kBBoxes / 2),
      problem, epilogue);
  ZRT_LAUNCHED();
}

// An odd number of tiles along a side leaves half a cluster idle. 2x1 reads a fifth less from the
// cache, so 1x2 must save 2 % of the tiles. 2x2 reads least and was the slowest
// (benchmarks/LOG.md).
ClusterShape best_cluster(const Problem& problem) {
  const int tiles_2x1 = ceil_div(problem.m_tiles, 2) * problem.n_tiles;
  const int tiles_1x2 = problem.m_tiles * ceil_div(problem.n_tiles, 2);
  return 50 * tiles_1x2 <= 49 * tiles_2x1 ? ClusterShape::k1x2 : ClusterShape::k2x1;
}

// `columns`: the columns that tiles of `tile_stride` cover; `half_stride`: see Problem.
template <typename T, typename Epilogue>
void dispatch(const FusedGemm& args, int half_stride, int tile_stride, int columns,
              const Epilogue& epilogue, cudaStream_t stream) {
  if (args.m == 0) return;
  if (args.k % 8 != 0 || args.n % kBox != 0)
    throw std::invalid_argument(
        "fused matrix product: expected a multiple of 8 as k and of 64 as n");
  Problem problem{};
  problem.m = args.m;
  problem.k_tiles = ceil_div(args.k, kBlockK);
  problem.m_tiles = ceil_div(args.m, kBlockM);
  problem.n_tiles = ceil_div(columns, tile_stride);
  problem.half_stride = half_stride;
  problem.tile_stride = tile_stride;
  const auto launch_with = [&](auto cluster_m, auto cluster_n) {
    constexpr int kClusterM = decltype(cluster_m)::value, kClusterN = decltype(cluster_n)::value;
    if (args.layout == Layout::kOutIn)
      launch<T, kClusterM, kClusterN, Layout::kOutIn>(args, problem, epilogue, stream);
    else
      launch<T, kClusterM, kClusterN, Layout::kInOut>(args, problem, epilogue, stream);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if ((args.cluster == ClusterShape::kAny ? best_cluster(problem) : args.cluster) ==
      ClusterShape::k2x1)
    launch_with(two, one);
  else
    launch_with(one, two);
}

}  // namespace

std::size_t fused_gemm_workspace_bytes() {
  int device = 0, multiprocessors = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return kFlagBytes + static_cast<std::size_t>(multiprocessors) * kBlockM * kBlockN * sizeof(float);
}

bool fused_gemm_runs_here() {
  int device = 0, major = 0, minor = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  ZRT_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes attributes;
  ZRT_CUDA(cudaFuncGetAttributes(
      &attributes, fused_gemm_kernel<__half, SwiGluEpilogue<__half>, 2, 1, Layout::kInOut>));
  return attributes.binaryVersion == 90;
}

void gemm_swiglu(const FusedGemm& args, float scale, cudaStream_t stream) {
  const int hidden = args.n / 2;
  if (args.n % 128 != 0)
    throw std::invalid_argument("gemm_swiglu: expected a multiple of 64 as n / 2");
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    dispatch<T>(args, hidden, kBlockN / 2, hidden,
                SwiGluEpilogue<T>{.out = static_cast<T*>(args.out), .n = hidden, .scale = scale},
                stream);
  });
}

void gemm_qk_norm_rope(const FusedGemm& args, const FusedQkNormRope& heads, cudaStream_t stream) {
  if (args.n % 128 != 0)
    throw std::invalid_argument("gemm_qk_norm_rope: expected heads of 128 columns");
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    dispatch<T>(
        args, kBlockN / 2, kBlockN, args.n,
        QkNormRopeEpilogue<T>{.out = static_cast<T*>(args.out), .n = args.n, .heads = heads},
        stream);
  });
}

}  // namespace zimage_rt
