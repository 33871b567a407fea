#pragma once

// Quantisation of a row that a block holds in registers: rotation, scale, 8-bit numbers.

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

// Largest magnitude of a format.
__device__ constexpr float largest_of(const std::int8_t*) { return 127.0f; }
__device__ constexpr float largest_of(const __nv_fp8_e4m3*) { return 448.0f; }

// A row without a larger magnitude is zero: the inverse of its scale could overflow.
constexpr float kSmallestRow = 1e-30f;

// Four values as one word, rounded to nearest even. Their magnitudes are at most the largest of the
// format, but for rounding.
__device__ inline std::uint32_t pack_8bit(float a, float b, float c, float d, const std::int8_t*) {
  const auto low = __byte_perm(static_cast<std::uint32_t>(__float2int_rn(a)),
                               static_cast<std::uint32_t>(__float2int_rn(b)), 0x0040);
  const auto high = __byte_perm(static_cast<std::uint32_t>(__float2int_rn(c)),
                                static_cast<std::uint32_t>(__float2int_rn(d)), 0x0040);
  return __byte_perm(low, high, 0x5410);
}
__device__ inline std::uint32_t pack_8bit(float a, float b, float c, float d,
                                          const __nv_fp8_e4m3*) {
  const std::uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const std::uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// The fast transform by Sylvester's matrix over the lanes' bits and the three bits of a lane's
// values.
__device__ inline void hadamard_256(float (&values)[8], int lane) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if ((i & step) == 0) {
        const float a = values[i], b = values[i + step];
        values[i] = a + b, values[i + step] = a - b;
      }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (float& value : values) {
      const float other = __shfl_xor_sync(0xffffffffu, value, step);
      value = upper ? other - value : value + other;
    }
  }
}

// ConvRot's 4 x 4 matrix is (ones - 2 I) with its rows reversed. This is the transform by ones - 2
// I for the four base-4 digits of a column: x becomes the sum over the digit minus 2 x. The
// reversal of all four digits, column 255 - i for i, remains.
__device__ inline void reversed_convrot_256(float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float sum = (values[i] + values[i + 1]) + (values[i + 2] + values[i + 3]);
#pragma unroll
    for (int j = i; j < i + 4; ++j) values[j] = sum - 2.0f * values[j];
  }
  // The second digit: the third bit of a lane's values, and the lane's first bit.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = values[i] + values[i + 4];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    values[i] = sum - 2.0f * values[i];
    values[i + 4] = sum - 2.0f * values[i + 4];
  }
#pragma unroll
  for (int step = 2; step < 32; step *= 4)
#pragma unroll
    for (float& value : values) {
      float sum = value + __shfl_xor_sync(0xffffffffu, value, step);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2 * step);
      value = sum - 2.0f * value;
    }
}

// Rotates 256 columns that a warp holds, eight per lane in order. Returns the lane whose columns
// this lane holds afterwards.
__device__ inline int rotate_256(float (&values)[8], Rotation rotation) {
  int lane = threadIdx.x % 32;
  if (rotation == Rotation::kHadamard) {
    hadamard_256(values, lane);
  } else {
    reversed_convrot_256(values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = values[i];
      values[i] = values[7 - i], values[7 - i] = value;
    }
    lane ^= 31;
  }
#pragma unroll
  for (float& value : values) value *= 1.0f / 16.0f;
  return lane;
}

// The largest magnitude over a block of whole warps, the same in every thread. The bits of
// magnitudes are ordered as the magnitudes are, with NaN above all.
__device__ inline float block_max_magnitude(std::uint32_t bits) {
  __shared__ std::uint32_t scratch[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  bits = __reduce_max_sync(0xffffffffu, bits);
  if (lane == 0) scratch[warp] = bits;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(0xffffffffu, lane < warps ? scratch[lane] : 0));
}

// Writes row `row` of `out` from a block's registers: values[v] of thread i are columns 8 * (v *
// blockDim.x + i) and the next seven, zeros from `columns` on. All threads of the block take part,
// once per launch. A row with NaN or infinity gets a scale that is not finite.
template <typename Q, int kVectors>
__device__ inline void quantize_row(float (&values)[kVectors][8], const QuantizedRows& out, int row,
                                    int columns) {
  const Q* const format = nullptr;
  const int own_lane = threadIdx.x % 32;
  int lane = own_lane;
  if (out.rotation != Rotation::kNone)
#pragma unroll
    for (auto& vector : values) lane = rotate_256(vector, out.rotation);
  std::uint32_t bits = 0;
#pragma unroll
  for (const auto& vector : values)
#pragma unroll
    for (const float value : vector) bits = max(bits, __float_as_uint(value) & 0x7fffffffu);
  const float magnitude = block_max_magnitude(bits);
  const bool zero = magnitude < kSmallestRow;
  if (threadIdx.x == 0) out.scales[row] = zero ? 0.0f : magnitude / largest_of(format);
  const float inverse = zero ? 0.0f : largest_of(format) / magnitude;
  auto* const target =
      static_cast<std::uint8_t*>(out.data) + static_cast<std::size_t>(row) * columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column =
        8 * (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x) - own_lane + lane);
    if (column >= columns) continue;
    float scaled[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) scaled[j] = values[v][j] * inverse;
    *reinterpret_cast<uint2*>(target + column) =
        make_uint2(pack_8bit(scaled[0], scaled[1], scaled[2], scaled[3], format),
                   pack_8bit(scaled[4], scaled[5], scaled[6], scaled[7], format));
  }
}

// Calls `function` with a value of the C++ type of an 8-bit DType.
template <typename Function>
void for_8bit_type(DType type, Function&& function) {
  if (type == DType::kInt8)
    function(std::int8_t{});
  else if (type == DType::kFloat8)
    function(__nv_fp8_e4m3{});
  else
    throw std::invalid_argument("expected int8 or float8");
}

// Throws std::invalid_argument for rows that cannot be written: 8-bit rows of whole 16 bytes are
// what products read, and rotations take whole groups.
inline void check_quantized_columns(int columns, const QuantizedRows& out) {
  if (columns % 16 != 0 || (out.rotation != Rotation::kNone && columns % kRotationColumns != 0))
    throw std::invalid_argument(
        "8-bit rows: expected a multiple of 16 columns, and of 256 with a rotation");
}

}  // namespace zimage_rt
