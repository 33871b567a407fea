#pragma once

// The distribution of the output tiles of a fused product to the clusters of a launch.

#include <cuda_runtime_api.h>

namespace zimage_rt::fused_gemm_detail {

struct Problem {
  int m, k_tiles, m_tiles, n_tiles;
  int m_steps, n_steps;  // tiles of whole clusters
  int raster_group;      // m_steps that are walked together
  int half_stride;       // columns between the two halves of a tile's columns
  int tile_stride;       // columns between neighbouring tiles
  int data_parallel_tiles;
  int stream_k_tiles;
  uint4* partials;  // [blocks, kConsumerWarpgroups, 32, 128]
  unsigned* flags;  // [blocks, kConsumerWarpgroups]
};

// A range of k tiles of one output tile.
struct WorkUnit {
  int tile, begin, end;
};

// A cluster's work. The first `data_parallel_tiles` are dealt out whole. The tiles of the last
// waves, which would not fill the device, are split along k and shared out evenly (stream-K; Osama
// et al., arXiv 2301.03598). A cluster may then begin inside a tile: it stores those partial sums
// for the cluster before it, which ends with the beginning of that tile.
class StreamKScheduler {
 public:
  __device__ StreamKScheduler(const Problem& problem, int cluster, int clusters)
      : problem_(problem),
        stride_(clusters),
        tile_(cluster),
        at_(first(problem, cluster, clusters)),
        end_(first(problem, cluster + 1, clusters)) {}

  __device__ bool next(WorkUnit& unit) {
    const int depth = problem_.k_tiles;
    if (tile_ < problem_.data_parallel_tiles) {
      unit = {tile_, 0, depth};
      tile_ += stride_;
      return true;
    }
    if (at_ >= end_) return false;
    const int begin = at_ % depth, length = min(depth - begin, end_ - at_);
    unit = {problem_.data_parallel_tiles + at_ / depth, begin, begin + length};
    at_ += length;
    return true;
  }

  // The first k tile of a cluster, counted over all stream-K tiles.
  __device__ static int first(const Problem& problem, int cluster, int clusters) {
    const auto all = static_cast<long long>(problem.stream_k_tiles) * problem.k_tiles;
    return static_cast<int>(all * cluster / clusters);
  }

 private:
  const Problem& problem_;
  int stride_, tile_, at_, end_;
};

}  // namespace zimage_rt::fused_gemm_detail
