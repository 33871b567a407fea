#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "kernels/early_start.cuh"
#include "kernels/numeric.cuh"
#include "kernels/qk_norm_rope.h"

namespace zimage_rt {
namespace {

// One block per row; a group of head_dim / 8 lanes per head, eight values per lane. A lane's
// partner in the rotation is half a group away.
template <typename T, int kHeadDim>
__global__ void qk_norm_rope_kernel(T* qkv, std::int64_t row_stride, const float* q_weight,
                                    const float* k_weight, const float* cos, const float* sin,
                                    int q_heads, int k_heads, float eps) {
  allow_early_start();
  wait_for_previous_kernel();
  constexpr int kLanes = kHeadDim / 8;
  const int lane = threadIdx.x % kLanes;
  const int groups = blockDim.x / kLanes;
  const int pair = lane * 8 % (kHeadDim / 2);
  const std::size_t row = blockIdx.x;
  float c[8], s[8];
  load8(cos + row * (kHeadDim / 2) + pair, c);
  load8(sin + row * (kHeadDim / 2) + pair, s);
  const float sign = lane < kLanes / 2 ? -1.0f : 1.0f;
  T* const base = qkv + row * row_stride + lane * 8;
  const int heads = q_heads + k_heads;
  // All lanes of a warp take part in the shuffles, even if their group has no head left.
  for (int first = 0; first < heads; first += groups) {
    const int head = first + static_cast<int>(threadIdx.x) / kLanes;
    const bool active = head < heads;
    float values[8] = {};
    if (active) load8(static_cast<const T*>(base) + head * kHeadDim, values);
    if (q_weight != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (const float value : values) sum += value * value;
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      const float factor = rsqrtf(sum / kHeadDim + eps);
      float weight[8];
      load8((head < q_heads ? q_weight : k_weight) + lane * 8, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] *= factor * weight[j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float partner = __shfl_xor_sync(0xffffffffu, values[j], kLanes / 2);
      values[j] = values[j] * c[j] + sign * partner * s[j];
    }
    if (active) store8(base + head * kHeadDim, values);
  }
}

template <typename T, int kHeadDim>
void launch(const QkNormRope& args, cudaStream_t stream) {
  constexpr int kLanes = kHeadDim / 8;
  // Half of the heads at a time: 480 threads for 30 + 30 heads of 128.
  const int wanted = ceil_div((args.q_heads + args.k_heads) * kLanes, 2);
  const int threads = ceil_div(wanted < 1024 ? wanted : 1024, 32) * 32;
  launch_early(qk_norm_rope_kernel<T, kHeadDim>, args.rows, threads, 0, 1, stream,
               static_cast<T*>(args.qkv), args.row_stride, args.q_weight, args.k_weight, args.cos,
               args.sin, args.q_heads, args.k_heads, args.eps);
}

}  // namespace

void qk_norm_rope(const QkNormRope& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    if (args.head_dim == 128)
      launch<T, 128>(args, stream);
    else if (args.head_dim == 64)
      launch<T, 64>(args, stream);
    else
      throw std::invalid_argument("qk_norm_rope: expected head_dim 64 or 128");
  });
}

}  // namespace zimage_rt
