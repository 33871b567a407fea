#include <cstdint>

#include "kernels/fused_gemm_launch.cuh"

namespace zimage_rt::fused_gemm_detail {

ZRT_FUSED_PRODUCTS(, std::int8_t);

}  // namespace zimage_rt::fused_gemm_detail
