#pragma once

// Launches of the fused products: cluster shapes, the share of stream-K tiles.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/fused_gemm.h"
#include "kernels/fused_gemm_epilogues.cuh"
#include "kernels/fused_gemm_kernel.cuh"
#include "kernels/numeric.cuh"
#include "kernels/stream_k.cuh"
#include "kernels/tensor_map.h"

namespace zimage_rt::fused_gemm_detail {

// The number of clusters of a kernel that are resident at once on the current device. Clusters of
// stream-K tiles wait for one another, so a launch must not have more.
template <typename T, int kClusterM, int kClusterN, typename Boxes, typename Epilogue>
int resident_clusters() {
  constexpr int kCluster = kClusterM * kClusterN;
  const auto kernel = fused_gemm_kernel<T, Epilogue, kClusterM, kClusterN, Boxes>;
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  std::atomic<int>& clusters = known[static_cast<std::size_t>(device) % known.size()];
  if (clusters.load() == 0) {
    ZRT_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    const int count = multiprocessors();
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

// Rows of the box of a cluster's first operand.
template <int kClusterN>
constexpr int kABoxRows = kClusterN == 1 ? kBlockM : kBox;

// Launches a problem whose members up to `tile_stride`, except the steps, are set.
template <typename T, int kClusterM, int kClusterN, typename Boxes, typename Epilogue>
void launch_boxes(const CUtensorMap& a_map, const Boxes& b_boxes, Problem problem, void* workspace,
                  const Epilogue& epilogue, cudaStream_t stream) {
  const auto kernel = fused_gemm_kernel<T, Epilogue, kClusterM, kClusterN, Boxes>;
  problem.m_steps = ceil_div(problem.m_tiles, kClusterM);
  problem.n_steps = ceil_div(problem.n_tiles, kClusterN);
  const int group = Operand<T>::kRasterGroupM / kClusterM;
  problem.raster_group =
      ceil_div(problem.m_steps, std::max(1, (problem.m_steps + group / 2) / group));
  const int tiles = problem.m_steps * problem.n_steps;
  const int clusters = std::min(tiles * problem.k_tiles,
                                resident_clusters<T, kClusterM, kClusterN, Boxes, Epilogue>());
  // The last full wave is split together with the tiles that remain.
  problem.data_parallel_tiles =
      tiles % clusters == 0 ? tiles : std::max(0, tiles / clusters - 1) * clusters;
  problem.stream_k_tiles = tiles - problem.data_parallel_tiles;
  problem.flags = static_cast<unsigned*>(workspace);
  problem.partials = reinterpret_cast<uint4*>(static_cast<std::byte*>(workspace) + kFlagBytes);
  kernel<<<clusters * kClusterM * kClusterN, kThreads, kSharedBytes, stream>>>(a_map, b_boxes,
                                                                               problem, epilogue);
  ZRT_LAUNCHED();
}

template <typename T, int kClusterM, int kClusterN, Layout kLayout, typename Epilogue>
void launch(const FusedGemm& args, const Problem& problem, const Epilogue& epilogue,
            cudaStream_t stream) {
  const WeightBoxes<T, kLayout> boxes{
      .map = kLayout == Layout::kOutIn
                 ? tensor_map(args.weight, args.type, args.n, args.k, kBlockN / 2, 1)
                 : tensor_map(args.weight, args.type, args.k, args.n, Operand<T>::kBlockK,
                              kBBoxes / 2)};
  launch_boxes<T, kClusterM, kClusterN>(
      tensor_map(args.a, args.type, args.m, args.k, kABoxRows<kClusterN>, 1), boxes, problem,
      args.workspace, epilogue, stream);
}

// An odd number of tiles along a side leaves half a cluster idle. 2x1 reads a fifth less from the
// cache, so 1x2 must save 2 % of the tiles. 2x2 reads least and was the slowest
// (benchmarks/LOG.md).
inline ClusterShape best_cluster(const Problem& problem) {
  const int tiles_2x1 = ceil_div(problem.m_tiles, 2) * problem.n_tiles;
  const int tiles_1x2 = problem.m_tiles * ceil_div(problem.n_tiles, 2);
  return 50 * tiles_1x2 <= 49 * tiles_2x1 ? ClusterShape::k1x2 : ClusterShape::k2x1;
}

// `columns`: the columns that tiles of `tile_stride` cover; `half_stride`: see Problem.
template <typename T, typename Epilogue>
void dispatch(const FusedGemm& args, int half_stride, int tile_stride, int columns,
              const Epilogue& epilogue, cudaStream_t stream) {
  if (args.m == 0) return;
  constexpr int kMultiple = 16 / sizeof(T);  // rows of TMA's matrices are whole 16 bytes
  if (args.k % kMultiple != 0 || args.n % kBox != 0)
    throw std::invalid_argument("fused matrix product: expected a multiple of " +
                                std::to_string(kMultiple) + " as k and of 64 as n");
  Problem problem{};
  problem.m = args.m;
  problem.k_tiles = ceil_div(args.k, Operand<T>::kBlockK);
  problem.m_tiles = ceil_div(args.m, kBlockM);
  problem.n_tiles = ceil_div(columns, tile_stride);
  problem.half_stride = half_stride;
  problem.tile_stride = tile_stride;
  const auto launch_with = [&](auto cluster_m, auto cluster_n) {
    constexpr int kClusterM = decltype(cluster_m)::value, kClusterN = decltype(cluster_n)::value;
    if (args.layout == Layout::kOutIn)
      launch<T, kClusterM, kClusterN, Layout::kOutIn>(args, problem, epilogue, stream);
    else if constexpr (sizeof(T) == 2)
      launch<T, kClusterM, kClusterN, Layout::kInOut>(args, problem, epilogue, stream);
    else
      throw std::invalid_argument("fused matrix product: expected 8-bit weights as [out, in]");
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if ((args.cluster == ClusterShape::kAny ? best_cluster(problem) : args.cluster) ==
      ClusterShape::k2x1)
    launch_with(two, one);
  else
    launch_with(one, two);
}

// Launches with an epilogue that works on the product: the sums or, of 8-bit operands, the scaled
// sums.
template <typename T, typename Epilogue>
void dispatch_scaled(const FusedGemm& args, int half_stride, int tile_stride, int columns,
                     const Epilogue& epilogue, cudaStream_t stream) {
  if constexpr (sizeof(T) == 1)
    dispatch<T>(args, half_stride, tile_stride, columns,
                DequantizeEpilogue<Epilogue>{.base = epilogue,
                                             .row_scales = args.row_scales,
                                             .column_scales = args.column_scales,
                                             .n = args.n,
                                             .half_stride = half_stride},
                stream);
  else
    dispatch<T>(args, half_stride, tile_stride, columns, epilogue, stream);
}

// Calls `function` with a value of the output's type: that of the operands or, of 8-bit ones, a
// 16-bit type by choice.
template <typename T, typename Function>
void for_out_type(const FusedGemm& args, Function&& function) {
  if constexpr (sizeof(T) == 1)
    for_half_type(args.out_type, function);
  else
    function(T{});
}

// The products of kernels/fused_gemm.h for operands of type T. Those of 8 bits are instantiated in
// files of their own, which compile beside one another.
template <typename T>
void swiglu_product(const FusedGemm& args, float scale, cudaStream_t stream) {
  const int hidden = args.n / 2;
  for_out_type<T>(args, [&](auto tag) {
    using Out = decltype(tag);
    dispatch_scaled<T>(
        args, hidden, kBlockN / 2, hidden,
        SwiGluEpilogue<Out>{.out = static_cast<Out*>(args.out), .n = hidden, .scale = scale},
        stream);
  });
}

template <typename T>
void qk_norm_rope_product(const FusedGemm& args, const FusedQkNormRope& heads,
                          cudaStream_t stream) {
  for_out_type<T>(args, [&](auto tag) {
    using Out = decltype(tag);
    // Beside the scales, registers hold the angles of one of a thread's two rows.
    constexpr int kPrefetchedRows = sizeof(T) == 1 ? 1 : 2;
    dispatch_scaled<T>(args, kBlockN / 2, kBlockN, args.n,
                       QkNormRopeEpilogue<Out, kPrefetchedRows>{
                           .out = static_cast<Out*>(args.out), .n = args.n, .heads = heads},
                       stream);
  });
}

template <typename T>
void plain_product(const FusedGemm& args, float alpha, cudaStream_t stream) {
  for_type(args.out_type, [&](auto tag) {
    using Out = decltype(tag);
    dispatch_scaled<T>(
        args, kBlockN / 2, kBlockN, args.n,
        ScaleEpilogue<Out>{.out = static_cast<Out*>(args.out), .n = args.n, .alpha = alpha},
        stream);
  });
}

// Explicit instantiations or, with `linkage` extern, their declarations.
#define ZRT_FUSED_PRODUCTS(linkage, T)                                                    \
  linkage template void swiglu_product<T>(const FusedGemm&, float, cudaStream_t);         \
  linkage template void qk_norm_rope_product<T>(const FusedGemm&, const FusedQkNormRope&, \
                                                cudaStream_t);                            \
  linkage template void plain_product<T>(const FusedGemm&, float, cudaStream_t)

}  // namespace zimage_rt::fused_gemm_detail
