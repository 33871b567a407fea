#pragma once

// What a fused product does with its sums: takes the 64 x 256 of a warpgroup, as `multiply_add`
// (kernels/hopper.cuh) leaves them in its threads, and writes what follows from them.

#include <cstddef>
#include <cstdint>

#include "kernels/fused_gemm.h"
#include "kernels/numeric.cuh"

namespace zimage_rt::fused_gemm_detail {

// What a thread holds of a tile: sums of rows `row` and `row` + 8, see multiply_add.
struct Place {
  int m;
  int row;
  int column;  // of sums[0], without the lane's part
  int t;       // lane % 4
};

// Four words a lane, of columns 8 i + 2 t of four neighbouring groups i, become the four words of
// group t: 16 bytes to write at once.
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

// Writes 32 neighbouring columns of one row: words[i] are columns first + 8 i + 2 t.
template <typename T>
__device__ inline void write32(T* out, int n, const Place& place, int row, int first,
                               std::uint32_t (&words)[4]) {
  transpose_quad(words, place.t);
  const int column = first + 8 * place.t;
  if (row >= place.m || column >= n) return;
  const Half8 packed{{words[0], words[1], words[2], words[3]}};
  *reinterpret_cast<Half8*>(out + static_cast<std::size_t>(row) * n + column) = packed;
}

// The tile's first half holds the gate, its second half the same columns of up.
template <typename T>
struct SwiGluOf {
  T* out;
  int n;
  float scale;

  struct Ahead {};
  __device__ Ahead ahead(const Place&) const { return {}; }
  // Two at once for one reciprocal: the special functions are what takes the time here. The bound
  // keeps their product finite, where silu has long been nothing.
  __device__ std::uint32_t two(const float* gate, const float* up) const {
    const float a = 1.0f + __expf(fminf(-gate[0], 40.0f));
    const float b = 1.0f + __expf(fminf(-gate[1], 40.0f));
    const float inverse = __fdividef(1.0f, a * b);
    return pack(gate[0] * up[0] * scale * (inverse * b), gate[1] * up[1] * scale * (inverse * a),
                static_cast<const T*>(nullptr));
  }
  __device__ void operator()(const float (&sums)[128], const Ahead&, const Place& place) const {
#pragma unroll
    for (int group = 0; group < 16; group += 4)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const gate = sums + 4 * (group + i) + 2 * half;
          const float* const up = gate + 64;
          words[i] = two(gate, up);
        }
        write32(out, n, place, place.row + 8 * half, place.column + 8 * group, words);
      }
  }
};

// Each half of a tile is one head of 128 columns.
template <typename T>
struct NormedAndTurned {
  T* out;
  int n;
  QkNormRopeOf of;

  // Both heads of a row turn by the same angles: columns 8 i + 2 t and the next of its tables. They
  // are asked for while the last products are under way.
  struct Ahead {
    float2 c[2][8], s[2][8];
  };
  __device__ Ahead ahead(const Place& place) const {
    Ahead tables;
    if (place.column / 128 < of.q_heads + of.k_heads)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(place.row + 8 * half, place.m - 1);
        const std::size_t at = static_cast<std::size_t>(row) * 64 + 2 * place.t;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          tables.c[half][i] = __ldg(reinterpret_cast<const float2*>(of.cos + at + 8 * i));
          tables.s[half][i] = __ldg(reinterpret_cast<const float2*>(of.sin + at + 8 * i));
        }
      }
    return tables;
  }
  __device__ void operator()(const float (&sums)[128], const Ahead& tables,
                             const Place& place) const {
    const int turned = of.q_heads + of.k_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place.row + 8 * half;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int head = place.column / 128 + side;
        float values[32];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          values[2 * i] = sums[64 * side + 4 * i + 2 * half];
          values[2 * i + 1] = sums[64 * side + 4 * i + 2 * half + 1];
        }
        if (head < turned)
          turn(values, head < of.q_heads ? of.q_weight : of.k_weight, tables.c[half],
               tables.s[half], place.t);
#pragma unroll
        for (int group = 0; group < 16; group += 4) {
          std::uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            words[i] = pack(values[2 * (group + i)], values[2 * (group + i) + 1],
                            static_cast<const T*>(nullptr));
          write32(out, n, place, row, place.column + 128 * side + 8 * group, words);
        }
      }
    }
  }

  // values[2 i], values[2 i + 1] are columns 8 i + 2 t, 8 i + 2 t + 1 of a head.
  __device__ void turn(float (&values)[32], const float* weight, const float2 (&c)[8],
                       const float2 (&s)[8], int t) const {
    if (weight != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (const float value : values) sum += value * value;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float factor = rsqrtf(sum / 128.0f + of.eps);
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
