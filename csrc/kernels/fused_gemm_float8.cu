#include <cuda_fp8.h>

#include "kernels/fused_gemm_launch.cuh"

namespace zimage_rt::fused_gemm_detail {

ZRT_FUSED_PRODUCTS(, __nv_fp8_e4m3);

}  // namespace zimage_rt::fused_gemm_detail
