#pragma once

// Epilogues of the fused product. Each takes the 64 x 256 sums of a warpgroup, in the register
// layout of `wgmma_m64n256k16` (kernels/hopper.cuh), and writes the output.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/fused_gemm.h"
#include "kernels/numeric.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt::fused_gemm_detail {

constexpr int kTileColumns = 256;
constexpr int kConsumerWarps = 8;  // after the four of the producer

// The part of a tile in a thread's registers: rows `row` and `row` + 8, see wgmma_m64n256k16.
struct ThreadTile {
  int m;
  int row;
  int column;  // of sums[0] in lane 0
  int t;       // lane % 4
};

// Stores 32 neighbouring columns of one row: words[i] holds columns first + 8 i + 2 t and the next.
template <typename T>
__device__ inline void store32(T* out, int n, const ThreadTile& tile, int row, int first,
                               std::uint32_t (&words)[4]) {
  transpose_quad(words, tile.t);
  const int column = first + 8 * tile.t;
  if (row >= tile.m || column >= n) return;
  const Half8 packed{{words[0], words[1], words[2], words[3]}};
  *reinterpret_cast<Half8*>(out + static_cast<std::size_t>(row) * n + column) = packed;
}

// Neighbouring sums j and j + 1; j is even. Epilogues read them when they need them, so that those
// of 8-bit operands are not all scaled at once.
__device__ inline float2 sum_pair(const float (&sums)[128], int j) {
  return make_float2(sums[j], sums[j + 1]);
}

// The sums of 8-bit operands, times their scales.
template <typename Sum>
struct ScaledSums {
  const Sum (&sums)[128];
  const float* columns;  // of the tile, in shared memory
  float rows[2];
  int t;
};
template <typename Sum>
__device__ inline float2 sum_pair(const ScaledSums<Sum>& scaled, int j) {
  const float2 column =
      *reinterpret_cast<const float2*>(scaled.columns + 8 * (j / 4) + 2 * scaled.t);
  const float row = scaled.rows[j / 2 % 2];
  return make_float2(static_cast<float>(scaled.sums[j]) * (row * column.x),
                     static_cast<float>(scaled.sums[j + 1]) * (row * column.y));
}

// Gives `Base` the product of 8-bit operands.
template <typename Base>
struct DequantizeEpilogue {
  Base base;
  const float* row_scales;     // [m]
  const float* column_scales;  // [n]
  int n;                       // columns of the weight
  int half_stride;             // see Problem

  // Scales of the thread's two rows, and of columns 8 * lane to 8 * lane + 7 of the tile.
  struct Prefetched {
    typename Base::Prefetched base;
    float rows[2];
    float columns[8];
  };
  __device__ Prefetched prefetch(const ThreadTile& tile) const {
    Prefetched scales{.base = base.prefetch(tile), .rows = {}, .columns = {}};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scales.rows[half] = __ldg(row_scales + min(tile.row + 8 * half, tile.m - 1));
    const int at = threadIdx.x % 32 * 8;
    const int column =
        tile.column + at / (kTileColumns / 2) * half_stride + at % (kTileColumns / 2);
    if (column < n) load8(column_scales + column, scales.columns);
    return scales;
  }
  template <typename Sum>
  __device__ void operator()(const Sum (&sums)[128], const Prefetched& scales,
                             const ThreadTile& tile) const {
    // A warp's copy of the columns' scales, so that it waits for no other warp.
    __shared__ alignas(16) float columns[kConsumerWarps][kTileColumns];
    float* const mine = columns[threadIdx.x / 32 - 4];
    __syncwarp();  // the warp has read those of the last tile
    store8(mine + threadIdx.x % 32 * 8, scales.columns);
    __syncwarp();
    base(
        ScaledSums<Sum>{
            .sums = sums, .columns = mine, .rows = {scales.rows[0], scales.rows[1]}, .t = tile.t},
        scales.base, tile);
  }
};

// out = alpha * product, in fp32 or 16 bits.
template <typename T>
struct ScaleEpilogue {
  T* out;
  int n;
  float alpha;

  struct Prefetched {};
  __device__ Prefetched prefetch(const ThreadTile&) const { return {}; }
  template <typename Sums>
  __device__ void operator()(const Sums& sums, const Prefetched&, const ThreadTile& tile) const {
#pragma unroll
    for (int group = 0; group < 32; group += 4)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto scaled = [&](int i) {
          const float2 pair = sum_pair(sums, 4 * (group + i) + 2 * half);
          return make_float2(alpha * pair.x, alpha * pair.y);
        };
        const int row = tile.row + 8 * half, column = tile.column + 8 * group;
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = column + 8 * i + 2 * tile.t;
            if (row < tile.m && at < n)
              *reinterpret_cast<float2*>(out + static_cast<std::size_t>(row) * n + at) = scaled(i);
          }
        } else {
          std::uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = scaled(i);
            words[i] = pack(pair.x, pair.y, static_cast<const T*>(nullptr));
          }
          store32(out, n, tile, row, column, words);
        }
      }
  }
};

// The first half of a tile's columns is the gate, the second half the same columns of up.
template <typename T>
struct SwiGluEpilogue {
  T* out;
  int n;
  float scale;

  struct Prefetched {};
  __device__ Prefetched prefetch(const ThreadTile&) const { return {}; }
  // Two values share one reciprocal, because the special function unit bounds this loop. The clamp
  // keeps the product of the denominators finite; silu is zero there in any 16-bit format.
  __device__ std::uint32_t swiglu2(float2 gate, float2 up) const {
    const float a = 1.0f + __expf(fminf(-gate.x, 40.0f));
    const float b = 1.0f + __expf(fminf(-gate.y, 40.0f));
    const float inverse = __fdividef(1.0f, a * b);
    return pack(gate.x * up.x * scale * (inverse * b), gate.y * up.y * scale * (inverse * a),
                static_cast<const T*>(nullptr));
  }
  template <typename Sums>
  __device__ void operator()(const Sums& sums, const Prefetched&, const ThreadTile& tile) const {
#pragma unroll
    for (int group = 0; group < 16; group += 4)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int gate = 4 * (group + i) + 2 * half;
          words[i] = swiglu2(sum_pair(sums, gate), sum_pair(sums, gate + 64));
        }
        store32(out, n, tile, tile.row + 8 * half, tile.column + 8 * group, words);
      }
  }
};

// Each half of a tile is one head of 128 columns. The angles of the first kPrefetchedRows rows of a
// thread are loaded while the last products are in flight, those of the others when their turn
// comes.
template <typename T, int kPrefetchedRows>
struct QkNormRopeEpilogue {
  T* out;
  int n;
  FusedQkNormRope heads;

  // Both heads of a row are rotated by the same angles: columns 8 i + 2 t and the next of its
  // tables.
  struct Angles {
    float2 c[8], s[8];
  };
  struct Prefetched {
    Angles rows[kPrefetchedRows];
  };
  __device__ bool any_rotated(const ThreadTile& tile) const {
    return tile.column / 128 < heads.q_heads + heads.k_heads;
  }
  __device__ void load_angles(const ThreadTile& tile, int half, Angles& angles) const {
    const int row = min(tile.row + 8 * half, tile.m - 1);
    const std::size_t at = static_cast<std::size_t>(row) * 64 + 2 * tile.t;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      angles.c[i] = __ldg(reinterpret_cast<const float2*>(heads.cos + at + 8 * i));
      angles.s[i] = __ldg(reinterpret_cast<const float2*>(heads.sin + at + 8 * i));
    }
  }
  __device__ Prefetched prefetch(const ThreadTile& tile) const {
    Prefetched angles;
    if (any_rotated(tile))
#pragma unroll
      for (int half = 0; half < kPrefetchedRows; ++half) load_angles(tile, half, angles.rows[half]);
    return angles;
  }
  template <typename Sums>
  __device__ void operator()(const Sums& sums, const Prefetched& prefetched,
                             const ThreadTile& tile) const {
    const int rotated = heads.q_heads + heads.k_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row + 8 * half;
      Angles angles;
      if (half < kPrefetchedRows)
        angles = prefetched.rows[min(half, kPrefetchedRows - 1)];
      else {
        // Keeps the compiler from holding the scales of all columns in registers for this row.
        __syncwarp();
        if (any_rotated(tile)) load_angles(tile, half, angles);
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int head = tile.column / 128 + side;
        float values[32];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float2 pair = sum_pair(sums, 64 * side + 4 * i + 2 * half);
          values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
        }
        if (head < rotated)
          norm_rope(values, head < heads.q_heads ? heads.q_weight : heads.k_weight, angles, tile.t);
#pragma unroll
        for (int group = 0; group < 16; group += 4) {
          std::uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            words[i] = pack(values[2 * (group + i)], values[2 * (group + i) + 1],
                            static_cast<const T*>(nullptr));
          store32(out, n, tile, row, tile.column + 128 * side + 8 * group, words);
        }
      }
    }
  }

  // values[2 i] and values[2 i + 1] are columns 8 i + 2 t and 8 i + 2 t + 1 of a head.
  __device__ void norm_rope(float (&values)[32], const float* weight, const Angles& angles,
                            int t) const {
    if (weight != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (const float value : values) sum += value * value;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float factor = rsqrtf(sum / 128.0f + heads.eps);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 w = __ldg(reinterpret_cast<const float2*>(weight + 8 * i + 2 * t));
        values[2 * i] *= factor * w.x;
        values[2 * i + 1] *= factor * w.y;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a0 = values[2 * i], a1 = values[2 * i + 1];
      const float b0 = values[2 * i + 16], b1 = values[2 * i + 17];
      values[2 * i] = a0 * angles.c[i].x - b0 * angles.s[i].x;
      values[2 * i + 1] = a1 * angles.c[i].y - b1 * angles.s[i].y;
      values[2 * i + 16] = b0 * angles.c[i].x + a0 * angles.s[i].x;
      values[2 * i + 17] = b1 * angles.c[i].y + a1 * angles.s[i].y;
    }
  }
};

}  // namespace zimage_rt::fused_gemm_detail
