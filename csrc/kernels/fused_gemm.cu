#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device/check.h"
#include "kernels/fused_gemm.h"
#include "kernels/fused_gemm_after.cuh"
#include "kernels/hopper.cuh"
#include "kernels/numeric.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace {

using namespace fused_gemm_detail;

// A block makes 128 x 256 of the product: one warpgroup feeds shared memory, two multiply 64 rows
// each. Two or four blocks are a cluster that shares the tiles of the matrices they have in common.
constexpr int kRows = 128, kColumns = 256, kDepth = 64;
constexpr int kBox = 64;  // numbers side by side in shared memory: 128 bytes, the widest swizzle
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kABoxes = kRows / kBox, kBBoxes = kColumns / kBox;
constexpr int kHalfBytes = kBBoxes / 2 * kBoxBytes;  // of the weight's tile
constexpr int kStageBytes = (kABoxes + kBBoxes) * kBoxBytes;
constexpr int kStages = 4;
// Tiles of so many rows are walked together: their part of `a`, 16 MB where k is 3840, stays in
// half of the L2 cache while the weight goes by.
constexpr int kBandRows = 16;
constexpr int kMultipliers = kRows / 64;
constexpr int kThreads = 128 * (1 + kMultipliers);
// Flags of up to 1024 blocks, before the sums of cut tiles.
constexpr std::size_t kFlagBytes = 1024 * kMultipliers * sizeof(unsigned);
// The swizzle repeats every 1024 bytes: stages must lie on them.
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;

struct Problem {
  int m, depth_tiles, row_tiles, column_tiles;
  int row_steps, column_steps;  // tiles of clusters
  int band;                     // row steps that are walked together
  int second;                   // columns between the halves of a tile's columns
  int step;                     // columns from one tile to the next
  int whole_tiles;
  int cut_tiles;
  float4* partials;  // [blocks, kMultipliers, 32, 128]
  unsigned* flags;   // [blocks, kMultipliers]
};

// Which part of which tile, along k.
struct Piece {
  int tile, begin, end;
};

// A cluster's share of the tiles. The first `whole_tiles` are dealt out whole. Those of the last
// rounds, which would not fill the device, are cut: laid behind one another along k and shared out
// evenly (stream-K; Osama et al., arXiv 2301.03598). A cluster then begins inside a tile, whose
// sums it leaves for the cluster before, which ends with the beginning of that tile.
class Share {
 public:
  __device__ Share(const Problem& problem, int cluster, int clusters)
      : problem_(problem),
        step_(clusters),
        tile_(cluster),
        at_(cut(problem, cluster, clusters)),
        end_(cut(problem, cluster + 1, clusters)) {}

  __device__ bool next(Piece& piece) {
    const int depth = problem_.depth_tiles;
    if (tile_ < problem_.whole_tiles) {
      piece = {tile_, 0, depth};
      tile_ += step_;
      return true;
    }
    if (at_ >= end_) return false;
    const int begin = at_ % depth, length = min(depth - begin, end_ - at_);
    piece = {problem_.whole_tiles + at_ / depth, begin, begin + length};
    at_ += length;
    return true;
  }

  // Where a cluster's part of the cut tiles begins.
  __device__ static int cut(const Problem& problem, int cluster, int clusters) {
    const auto all = static_cast<long long>(problem.cut_tiles) * problem.depth_tiles;
    return static_cast<int>(all * cluster / clusters);
  }

 private:
  const Problem& problem_;
  int step_, tile_, at_, end_;
};

// A cluster is kTall blocks above one another, which share the weight's tile, times kWide side by
// side, which share that of `a`: each brings its part of a shared tile for all of them. Tiles are
// walked down the rows first, so that the weight is read once and `a` stays in the cache.
template <typename T, typename Epilogue, int kTall, int kWide, bool kTurned>
__global__ void __cluster_dims__(kTall* kWide, 1, 1) __launch_bounds__(kThreads, 1)
    fused_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map, const Problem problem,
                      const Epilogue epilogue) {
#if ZRT_HOPPER
  extern __shared__ std::byte shared[];
  const std::uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const std::uint32_t full = stages + kStages * kStageBytes, empty = full + kStages * 8;
  constexpr int kCluster = kTall * kWide;
  // Blocks that bring something here, and to which this one brings something: itself, those above
  // and below and those beside it.
  constexpr int kPartners = kTall + kWide - 1;
  const int rank = static_cast<int>(cluster_rank()), above = rank / kWide, beside = rank % kWide;
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kPartners * kMultipliers);
    }
    fence_barrier_init();
    prefetch_map(&a_map);
    prefetch_map(&b_map);
  }
  cluster_arrive();
  cluster_wait();

  const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
  const auto place = [&](int tile, int& row, int& column) {
    const int band = tile / (problem.band * problem.column_steps);
    const int height = min(problem.band, problem.row_steps - band * problem.band);
    const int step = tile - band * problem.band * problem.column_steps;
    const int row_step = band * problem.band + step % height, column_step = step / height;
    row = kRows * (kTall * row_step + above);
    column = problem.step * (kWide * column_step + beside);
  };
  Share share(problem, cluster, clusters);
  Piece piece;

  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      std::uint16_t whole_row = 0, whole_column = 0;  // of the cluster, as masks
      for (int i = 0; i < kWide; ++i) whole_row |= 1u << (above * kWide + i);
      for (int i = 0; i < kTall; ++i) whole_column |= 1u << (i * kWide + beside);
      std::uint32_t stage = 0, parity = 1;
      while (share.next(piece)) {
        int row, column;
        place(piece.tile, row, column);
        // Half of the weight's tile: 128 rows of a turned one, else two strips of 64 columns.
        const auto half_at = [&](int half, int k, int& x, int& y, int& z) {
          const int first = column + half * problem.second;
          x = kTurned ? k * kDepth : 0, y = kTurned ? first : k * kDepth,
          z = kTurned ? 0 : first / kBox;
        };
        for (int k = piece.begin; k < piece.end; ++k) {
          barrier_wait(empty + 8 * stage, parity);
          const std::uint32_t barrier = full + 8 * stage;
          const std::uint32_t a = stages + stage * kStageBytes, b = a + kABoxes * kBoxBytes;
          barrier_expect(barrier, kStageBytes);
          int x, y, z;
          if (kWide == 1)
            copy_box(a, &a_map, k * kDepth, row, 0, barrier);
          else
            copy_box_to(a + beside * kBoxBytes, &a_map, k * kDepth, row + beside * kBox, 0, barrier,
                        whole_row);
          for (int half = 0; half < 2; ++half) {
            if (kTall == 2 && half != above) continue;
            half_at(half, k, x, y, z);
            const std::uint32_t to = b + half * kHalfBytes;
            if (kTall == 1)
              copy_box(to, &b_map, x, y, z, barrier);
            else
              copy_box_to(to, &b_map, x, y, z, barrier, whole_column);
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();  // the cluster's barrier wants whole warps
  } else {
    take_registers<232>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, in_group = threadIdx.x % 128;
    const std::uint64_t a_tile = matrix_descriptor(stages + (group - 1) * kBoxBytes, 0, 1024);
    const std::uint64_t b_tile =
        matrix_descriptor(stages + kABoxes * kBoxBytes, kTurned ? 0 : kBoxBytes, 1024);
    constexpr int kBPart = kTurned ? 32 : 16 * 128;  // bytes from 16 of k to the next
    float sums[128];
    std::uint32_t stage = 0, parity = 0;
    const auto release = [&](std::uint32_t which) {
      if (in_group >= kPartners) return;
      const int other = in_group - kWide;  // of the rows that are not this block's
      const int partner =
          in_group < kWide ? above * kWide + in_group : (other + (other >= above)) * kWide + beside;
      barrier_arrive_at(empty + 8 * which, partner);
    };
    const auto slot = [&](int of) { return (kCluster * of + rank) * kMultipliers + group - 1; };
    const auto partials = [&](int of) {
      return problem.partials + static_cast<std::size_t>(slot(of)) * 32 * 128 + in_group;
    };
    while (share.next(piece)) {
      std::uint32_t before = 0;
      for (int k = piece.begin; k < piece.end; ++k) {
        barrier_wait(full + 8 * stage, parity);
        // Addresses in a descriptor count 16 bytes, and what is added to them does not carry over.
        const std::uint64_t shift = stage * (kStageBytes >> 4);
        warpgroup_fence();
#pragma unroll
        for (int part = 0; part < kDepth / 16; ++part)
          multiply_add<kTurned>(sums, a_tile + shift + part * (32 >> 4),
                                b_tile + shift + part * (kBPart >> 4), k > piece.begin || part > 0,
                                static_cast<const T*>(nullptr));
        warpgroup_commit();
        // The products of the stage before are done when only the latest are under way.
        warpgroup_wait<1>();
        if (k > piece.begin) release(before);
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      int row, column;
      place(piece.tile, row, column);
      row += (group - 1) * 64;
      const Place here{
          .m = problem.m, .row = row + 16 * warp + lane / 4, .column = column, .t = lane % 4};
      const typename Epilogue::Ahead tables = epilogue.ahead(here);
      warpgroup_wait<0>();
      release(before);
      if (row >= problem.m) continue;
      if (piece.begin > 0) {
        float4* const to = partials(cluster);
#pragma unroll
        for (int i = 0; i < 32; ++i)
          __stcg(to + i * 128,
                 make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
        __threadfence();
        group_sync(group);
        if (in_group == 0) store_release(problem.flags + slot(cluster), 1);
        continue;
      }
      // What clusters behind this one made of the tile, in their order: the sum is always the same.
      const int tile_end = (piece.tile - problem.whole_tiles + 1) * problem.depth_tiles;
      for (int of = cluster + 1;
           piece.end < problem.depth_tiles && Share::cut(problem, of, clusters) < tile_end; ++of) {
        if (in_group == 0)
          while (load_acquire(problem.flags + slot(of)) == 0) {
          }
        group_sync(group);
        const float4* const from = partials(of);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const float4 more = __ldcg(from + i * 128);
          sums[4 * i] += more.x, sums[4 * i + 1] += more.y;
          sums[4 * i + 2] += more.z, sums[4 * i + 3] += more.w;
        }
        group_sync(group);
        // For the next launch.
        if (in_group == 0) store_release(problem.flags + slot(of), 0);
      }
      epilogue(sums, tables, here);
    }
  }
  // The other block may still copy to this one's memory, or arrive at its barriers.
  cluster_arrive();
  cluster_wait();
#endif
}

// A map of a row-major matrix for the copy engine: columns in strips of 64, which lie behind one
// another in shared memory. A copy brings `rows_once` rows of `strips_once` strips.
CUtensorMap tensor_map(const void* data, DType type, int rows, int columns, int rows_once,
                       int strips_once) {
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
  // One strip is the whole matrix where a copy brings no more than one.
  const bool stripped = strips_once > 1;
  const cuuint64_t size[] = {wide(stripped ? kBox : columns), wide(rows),
                             wide(stripped ? columns / kBox : 1)};
  const cuuint64_t stride[] = {wide(columns) * size_of(type), wide(kBox) * size_of(type)};
  const cuuint32_t box[] = {kBox, static_cast<cuuint32_t>(rows_once),
                            static_cast<cuuint32_t>(strips_once)};
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

// How many clusters of a kernel run at once on the current device. Cut tiles wait for one another:
// no cluster may be left for later.
template <typename T, int kTall, int kWide, bool kTurned, typename Epilogue>
int resident_clusters() {
  constexpr int kCluster = kTall * kWide;
  const auto kernel = fused_gemm_kernel<T, Epilogue, kTall, kWide, kTurned>;
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

template <typename T, int kTall, int kWide, bool kTurned, typename Epilogue>
void launch(const FusedGemm& args, Problem problem, const Epilogue& epilogue, cudaStream_t stream) {
  const auto kernel = fused_gemm_kernel<T, Epilogue, kTall, kWide, kTurned>;
  problem.row_steps = ceil_div(problem.row_tiles, kTall);
  problem.column_steps = ceil_div(problem.column_tiles, kWide);
  const int rows_at_once = kBandRows / kTall;
  problem.band = ceil_div(problem.row_steps,
                          std::max(1, (problem.row_steps + rows_at_once / 2) / rows_at_once));
  const int tiles = problem.row_steps * problem.column_steps;
  const int clusters = std::min(tiles * problem.depth_tiles,
                                resident_clusters<T, kTall, kWide, kTurned, Epilogue>());
  // Whole rounds are dealt out whole, but the last of them: it is cut with what remains.
  problem.whole_tiles =
      tiles % clusters == 0 ? tiles : std::max(0, tiles / clusters - 1) * clusters;
  problem.cut_tiles = tiles - problem.whole_tiles;
  problem.flags = static_cast<unsigned*>(args.workspace);
  problem.partials =
      reinterpret_cast<float4*>(static_cast<std::byte*>(args.workspace) + kFlagBytes);
  kernel<<<clusters * kTall * kWide, kThreads, kSharedBytes, stream>>>(
      tensor_map(args.a, args.type, args.m, args.k, kWide == 1 ? kRows : kBox, 1),
      kTurned ? tensor_map(args.weight, args.type, args.n, args.k, kColumns / 2, 1)
              : tensor_map(args.weight, args.type, args.k, args.n, kDepth, kBBoxes / 2),
      problem, epilogue);
  ZRT_LAUNCHED();
}

// Where a side has an odd number of tiles, pairs along it leave half a cluster idle. Tall ones read
// a fifth less from the cache: wide ones must save 2 % of the tiles. Square ones of four blocks
// read least, and were the slowest (benchmarks/LOG.md).
ClusterShape best_cluster(const Problem& problem) {
  const int tall = ceil_div(problem.row_tiles, 2) * problem.column_tiles;
  const int wide = problem.row_tiles * ceil_div(problem.column_tiles, 2);
  return 50 * wide <= 49 * tall ? ClusterShape::kWide : ClusterShape::kTall;
}

// `second`: see Problem; `step`: new columns a tile.
template <typename T, typename Epilogue>
void dispatch(const FusedGemm& args, int second, int step, int columns, const Epilogue& epilogue,
              cudaStream_t stream) {
  if (args.m == 0) return;
  if (args.k % 8 != 0 || args.n % kBox != 0)
    throw std::invalid_argument(
        "fused matrix product: expected a multiple of 8 as k and of 64 as n");
  Problem problem{};
  problem.m = args.m;
  problem.depth_tiles = ceil_div(args.k, kDepth);
  problem.row_tiles = ceil_div(args.m, kRows);
  problem.column_tiles = ceil_div(columns, step);
  problem.second = second;
  problem.step = step;
  const auto go = [&](auto tall, auto wide) {
    constexpr int kTall = decltype(tall)::value, kWide = decltype(wide)::value;
    if (args.turned)
      launch<T, kTall, kWide, true>(args, problem, epilogue, stream);
    else
      launch<T, kTall, kWide, false>(args, problem, epilogue, stream);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if ((args.cluster == ClusterShape::kAny ? best_cluster(problem) : args.cluster) ==
      ClusterShape::kTall)
    go(two, one);
  else
    go(one, two);
}

}  // namespace

std::size_t fused_gemm_workspace_bytes() {
  int device = 0, multiprocessors = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return kFlagBytes + static_cast<std::size_t>(multiprocessors) * kRows * kColumns * sizeof(float);
}

bool fused_gemm_runs_here() {
  int device = 0, major = 0, minor = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  ZRT_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes attributes;
  ZRT_CUDA(
      cudaFuncGetAttributes(&attributes, fused_gemm_kernel<__half, SwiGluOf<__half>, 2, 1, false>));
  return attributes.binaryVersion == 90;
}

void gemm_swiglu(const FusedGemm& args, float scale, cudaStream_t stream) {
  const int hidden = args.n / 2;
  if (args.n % 128 != 0)
    throw std::invalid_argument("gemm_swiglu: expected a multiple of 64 as n / 2");
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    dispatch<T>(args, hidden, kColumns / 2, hidden,
                SwiGluOf<T>{.out = static_cast<T*>(args.out), .n = hidden, .scale = scale}, stream);
  });
}

void gemm_qk_norm_rope(const FusedGemm& args, const QkNormRopeOf& after, cudaStream_t stream) {
  if (args.n % 128 != 0)
    throw std::invalid_argument("gemm_qk_norm_rope: expected heads of 128 columns");
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    dispatch<T>(args, kColumns / 2, kColumns, args.n,
                NormedAndTurned<T>{.out = static_cast<T*>(args.out), .n = args.n, .of = after},
                stream);
  });
}

}  // namespace zimage_rt
