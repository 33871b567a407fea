#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "device/dtype.h"

namespace zimage_rt {

// Eight 16-bit numbers: one 16-byte load or store.
struct alignas(16) Half8 {
  std::uint32_t words[4];
};

__device__ inline float2 unpack(std::uint32_t word, const __half*) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ inline float2 unpack(std::uint32_t word, const __nv_bfloat16*) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}
__device__ inline std::uint32_t pack(float a, float b, const __half*) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ inline std::uint32_t pack(float a, float b, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// Reads eight consecutive values as fp32. `source` is 16-byte aligned (32 for float).
template <typename T>
__device__ inline void load8(const T* source, float (&values)[8]) {
  const Half8 packed = *reinterpret_cast<const Half8*>(source);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(packed.words[i], static_cast<const T*>(nullptr));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}
template <>
__device__ inline void load8<float>(const float* source, float (&values)[8]) {
  const float4 a = reinterpret_cast<const float4*>(source)[0];
  const float4 b = reinterpret_cast<const float4*>(source)[1];
  values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
  values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
}

// Writes eight values, rounded to nearest even.
template <typename T>
__device__ inline void store8(T* target, const float (&values)[8]) {
  Half8 packed;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    packed.words[i] = pack(values[2 * i], values[2 * i + 1], static_cast<const T*>(nullptr));
  *reinterpret_cast<Half8*>(target) = packed;
}
template <>
__device__ inline void store8<float>(float* target, const float (&values)[8]) {
  reinterpret_cast<float4*>(target)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(target)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

// A byte of an image from its value in [-1, 1], as zimage_rt.image.convert.to_uint8 rounds it.
__device__ inline std::uint8_t image_to_uint8(float image) {
  const float unit = __fadd_rn(__fmul_rn(image, 0.5f), 0.5f);
  return static_cast<std::uint8_t>(
      __float2int_rn(__fmul_rn(fminf(fmaxf(unit, 0.0f), 1.0f), 255.0f)));
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over a block of whole warps, the same in every thread and in every run. `scratch` holds
// 32 floats and may be used again after the next __syncthreads.
__device__ inline float block_sum(float value, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

// Calls `function` with a value of the C++ type of a 16-bit DType.
template <typename Function>
void for_half_type(DType type, Function&& function) {
  switch (type) {
    case DType::kFloat16:
      function(__half{});
      return;
    case DType::kBFloat16:
      function(__nv_bfloat16{});
      return;
    default:
      throw std::invalid_argument("expected fp16 or bf16");
  }
}

// The same for fp32, fp16 and bf16.
template <typename Function>
void for_type(DType type, Function&& function) {
  if (type == DType::kFloat32)
    function(float{});
  else
    for_half_type(type, function);
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace zimage_rt
