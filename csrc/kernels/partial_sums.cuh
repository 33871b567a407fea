#pragma once

#include <cuda_runtime.h>

namespace zimage_rt {

// Four partial sums of a product as they travel between blocks: by their bits.
__device__ inline uint4 to_partial(const float* sums) {
  return make_uint4(__float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]),
                    __float_as_uint(sums[3]));
}
__device__ inline uint4 to_partial(const int* sums) {
  return make_uint4(static_cast<unsigned>(sums[0]), static_cast<unsigned>(sums[1]),
                    static_cast<unsigned>(sums[2]), static_cast<unsigned>(sums[3]));
}
__device__ inline void add_partial(float* sums, const uint4& more) {
  sums[0] += __uint_as_float(more.x), sums[1] += __uint_as_float(more.y);
  sums[2] += __uint_as_float(more.z), sums[3] += __uint_as_float(more.w);
}
__device__ inline void add_partial(int* sums, const uint4& more) {
  sums[0] += static_cast<int>(more.x), sums[1] += static_cast<int>(more.y);
  sums[2] += static_cast<int>(more.z), sums[3] += static_cast<int>(more.w);
}

}  // namespace zimage_rt
