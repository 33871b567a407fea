#pragma once

// Epilogues of the fused product. Each takes the 64 x 256 sums of a warpgroup, in the register
// layout of `wgmma_m64n256k16` (kernels/hopper.cuh), and writes the output.

#include <cstddef>
#include <cstdint>

#include "kernels/fused_gemm.h"
#include "kernels/numeric.cuh"

namespace zimage_rt::fused_gemm_detail {

// The part of a tile in a thread's registers: rows `row` and `row` + 8, see wgmma_m64n256k16.
struct ThreadTile {
  int m;
  int row;
  int column;  // of sums[0] in lane 0
  int t;       // lane % 4
};

// Transposes four words per lane within a quad: words[i] of columns 8 i + 2 t becomes four words of
// group t, so that a lane stores 16 consecutive bytes.
__device__ inline void transpose_quad(std::uint32_t (&words)[4], int t) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (t & step) != 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = step == 1 ? 2 * pair : pair, high = low + step;
      const std::uint32_t sent = upper ? words[low] : words[high];
      const std::uint32_t got = __shfl_xor_sync(0xffffffffu, sent, step);
      (upper ? words[low] : words[high]) = got;
    }
  }
}

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
  __device__ std::uint32_t swiglu2(const float* gate, const float* up) const {
    const float a = 1.0f + __expf(fminf(-gate[0], 40.0f));
    const float b = 1.0f + __expf(fminf(-gate[1], 40.0f));
    const float inverse = __fdividef(1.0f, a * b);
    return pack(gate[0] * up[0] * scale * (inverse * b), gate[1] * up[1] * scale * (inverse * a),
                static_cast<const T*>(nullptr));
  }
  __device__ void operator()(const float (&sums)[128], const Prefetched&,
                             const ThreadTile& tile) const {
#pragma unroll
    for (int group = 0; group < 16; group += 4)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const gate = sums + 4 * (group + i) + 2 * half;
          const float* const up = gate + 64;
          words[i] = swiglu2(gate, up);
        }
        store32(out, n, tile, tile.row + 8 * half, tile.column + 8 * group, words);
      }
  }
};

// Each half of a tile is one head of 128 columns.
template <typename T>
struct QkNormRopeEpilogue {
  T* out;
  int n;
  FusedQkNormRope heads;

  // Both heads of a row are rotated by the same angles: columns 8 i + 2 t and the next of its
  // tables. They are loaded while the last products are in flight.
  struct Prefetched {
    float2 c[2][8], s[2][8];
  };
  __device__ Prefetched prefetch(const ThreadTile& tile) const {
    Prefetched tables;
    if (tile.column / 128 < heads.q_heads + heads.k_heads)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(tile.row + 8 * half, tile.m - 1);
        const std::size_t at = static_cast<std::size_t>(row) * 64 + 2 * tile.t;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          tables.c[half][i] = __ldg(reinterpret_cast<const float2*>(heads.cos + at + 8 * i));
          tables.s[half][i] = __ldg(reinterpret_cast<const float2*>(heads.sin + at + 8 * i));
        }
      }
    return tables;
  }
  __device__ void operator()(const float (&sums)[128], const Prefetched& tables,
                             const ThreadTile& tile) const {
    const int rotated = heads.q_heads + heads.k_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row + 8 * half;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int head = tile.column / 128 + side;
        float values[32];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          values[2 * i] = sums[64 * side + 4 * i + 2 * half];
          values[2 * i + 1] = sums[64 * side + 4 * i + 2 * half + 1];
        }
        if (head < rotated)
          norm_rope(values, head < heads.q_heads ? heads.q_weight : heads.k_weight, tables.c[half],
                    tables.s[half], tile.t);
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
  __device__ void norm_rope(float (&values)[32], const float* weight, const float2 (&c)[8],
                            const float2 (&s)[8], int t) const {
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
      values[2 * i] = a0 * c[i].x - b0 * s[i].x;
      values[2 * i + 1] = a1 * c[i].y - b1 * s[i].y;
      values[2 * i + 16] = b0 * c[i].x + a0 * s[i].x;
      values[2 * i + 17] = b1 * c[i].y + a1 * s[i].y;
    }
  }
};

}  // namespace zimage_rt::fused_gemm_detail
