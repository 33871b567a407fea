#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/dtype.h"

namespace zimage_rt {

// What a ControlNet does to residual streams beside their norms; fp32, counts are multiples of 8.

// out = x * scale, rounded to `type`: what a matrix product reads of a stream that is not normed.
void scaled_copy(const float* x, float scale, void* out, DType type, std::size_t count,
                 cudaStream_t stream);

// x += *scale * added. The scale lies on the device, so that a captured addition serves any; null
// is 1.
void scaled_add(float* x, const float* added, const float* scale, std::size_t count,
                cudaStream_t stream);

}  // namespace zimage_rt
