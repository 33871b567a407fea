#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"
#include "kernels/conv2d.h"

namespace zimage_rt {

// Group norm of one image [pixels, channels], NHWC, in two steps.
//
// 1. From the parts of the channels' sums that a convolution left (Conv2d::sums), added in double
//    and always in the same order: y = x * affine.scale + affine.shift per channel.
struct alignas(8) ChannelAffine {
  float scale, shift;
};
struct GroupNormStatistics {
  const ChannelSums* sums;  // [parts, channels]
  int parts;
  std::int64_t pixels;
  int channels;
  int groups;           // divides channels
  const float* weight;  // [channels], as bias
  const float* bias;
  float eps;
  ChannelAffine* affine;  // [channels]
};
void group_norm_statistics(const GroupNormStatistics& args, cudaStream_t stream);

// 2. out = x * scale + shift, then x * sigmoid(x) if `silu`.
struct GroupNormApply {
  const void* x;  // [pixels, channels]
  void* out;      // may be x
  DType dtype;
  std::int64_t pixels;
  int channels;  // a multiple of 8
  const ChannelAffine* affine;
  bool silu;
};
void group_norm_apply(const GroupNormApply& args, cudaStream_t stream);

}  // namespace zimage_rt
