#pragma once

#include <cuda_runtime_api.h>

#include "kernels/mma_gemm_8bit.h"

namespace zimage_rt {

constexpr int kFewRows = 256;  // at most

// The product of mma_gemm_8bit for few rows on Hopper, at the speed at which memory gives the
// weight; it uses no workspace, and runs where kernels/fused_gemm.h does. The kernel starts, and
// loads its weight, while the previous one drains: that one must not write the weight.
void few_rows_gemm_8bit(const Gemm8bit& args, cudaStream_t stream);

}  // namespace zimage_rt
