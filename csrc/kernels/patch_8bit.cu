#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/patch_8bit.h"

namespace zimage_rt {
namespace {

constexpr int kThreads = 256;

// Kronecker powers of one 4 x 4 matrix are applied one after another, with strides 1, 4, 16, 64.
__device__ void rotate_row(float* row, int in) {
  for (int stride = 1; stride < kRotationColumns; stride *= 4) {
    for (int i = threadIdx.x; i < in / 4; i += kThreads) {
      const int group = i / (kRotationColumns / 4), inside = i % (kRotationColumns / 4);
      float* const first =
          row + group * kRotationColumns + inside / stride * 4 * stride + inside % stride;
      const float a = first[0], b = first[stride], c = first[2 * stride], d = first[3 * stride];
      first[0] = 0.5f * (a + b + c - d);
      first[stride] = 0.5f * (a + b - c + d);
      first[2 * stride] = 0.5f * (a - b + c + d);
      first[3 * stride] = 0.5f * (b + c + d - a);
    }
    __syncthreads();
  }
}

__device__ float to_float(std::int8_t value) { return value; }
__device__ float to_float(__nv_fp8_e4m3 value) { return static_cast<float>(value); }
__device__ void round_to(float value, std::int8_t& out) {
  out = static_cast<std::int8_t>(__float2int_rn(fminf(fmaxf(value, -127.0f), 127.0f)));
}
__device__ void round_to(float value, __nv_fp8_e4m3& out) { out = __nv_fp8_e4m3(value); }

// A block per row, whose numbers are in shared memory.
template <typename T>
__global__ void patch_8bit_kernel(Patch8bit args, float limit) {
  extern __shared__ float row[];
  __shared__ float peaks[kThreads / 32];
  const int r = blockIdx.x;
  T* const stored = static_cast<T*>(args.matrix) + static_cast<std::size_t>(r) * args.in;
  for (int k = threadIdx.x; k < args.in; k += kThreads) {
    float sum =
        args.delta == nullptr ? 0.0f : args.delta[static_cast<std::size_t>(k) * args.rows + r];
    for (int i = 0; i < args.rank; ++i)
      sum += args.down[static_cast<std::size_t>(i) * args.in + k] *
             args.up[static_cast<std::size_t>(i) * args.rows + r];
    row[k] = sum;
  }
  __syncthreads();
  if (args.rotation == Rotation::kConvRot) rotate_row(row, args.in);
  const float scale = args.scales[r];
  float peak = 0.0f;
  bool finite = true;
  for (int k = threadIdx.x; k < args.in; k += kThreads) {
    row[k] += to_float(stored[k]) * scale;
    finite = finite && isfinite(row[k]);
    peak = fmaxf(peak, fabsf(row[k]));
  }
  if (!finite) *args.overflow = 1;
  for (int step = 16; step > 0; step /= 2)
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, step));
  if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) peak = fmaxf(peak, peaks[i]);
  const float after = peak / limit;
  for (int k = threadIdx.x; k < args.in; k += kThreads)
    round_to(after > 0.0f ? row[k] / after : 0.0f, stored[k]);
  if (threadIdx.x == 0) args.scales[r] = after;
}

template <typename T>
void launch(const Patch8bit& args, float limit, cudaStream_t stream) {
  const int bytes = args.in * static_cast<int>(sizeof(float));
  ZRT_CUDA(cudaFuncSetAttribute(patch_8bit_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kPatchColumns * static_cast<int>(sizeof(float))));
  patch_8bit_kernel<T><<<static_cast<unsigned>(args.rows), kThreads, bytes, stream>>>(args, limit);
  ZRT_LAUNCHED();
}

}  // namespace

void patch_8bit(const Patch8bit& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  if (args.in > kPatchColumns || args.rotation == Rotation::kHadamard ||
      (args.rotation != Rotation::kNone && args.in % kRotationColumns != 0))
    throw std::invalid_argument("patch_8bit: expected at most " + std::to_string(kPatchColumns) +
                                " columns, in groups of 256 with a rotation, got " +
                                std::to_string(args.in));
  if (args.type == DType::kInt8)
    launch<std::int8_t>(args, 127.0f, stream);
  else
    launch<__nv_fp8_e4m3>(args, 448.0f, stream);
}

}  // namespace zimage_rt
