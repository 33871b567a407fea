#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/dtype.h"

namespace zimage_rt {

// Operations of a ControlNet on residual streams, fp32; counts are multiples of 8.

// out = x * scale, rounded to `type`: the input of a matrix product on a stream without a norm.
void scaled_copy(const float* x, float scale, void* out, DType type, std::size_t count,
                 cudaStream_t stream);

// x += *scale * added. The scale is device memory, so that a captured addition serves any value;
// null is 1.
void scaled_add(float* x, const float* added, const float* scale, std::size_t count,
                cudaStream_t stream);

}  // namespace zimage_rt
