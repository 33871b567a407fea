#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/fused_gemm.h"
#include "kernels/fused_gemm_epilogues.cuh"
#include "kernels/fused_gemm_kernel.cuh"
#include "kernels/fused_gemm_launch.cuh"
#include "kernels/numeric.cuh"
#include "kernels/quantize.cuh"

namespace zimage_rt {
namespace fused_gemm_detail {

ZRT_FUSED_PRODUCTS(extern, std::int8_t);
ZRT_FUSED_PRODUCTS(extern, __nv_fp8_e4m3);

}  // namespace fused_gemm_detail
namespace {

using namespace fused_gemm_detail;

// Calls `function` with a value of the C++ type of an operand's DType.
template <typename Function>
void for_operand_type(DType type, Function&& function) {
  if (is_8bit(type))
    for_8bit_type(type, function);
  else
    for_half_type(type, function);
}

}  // namespace

std::size_t fused_gemm_workspace_bytes() {
  return kFlagBytes +
         static_cast<std::size_t>(multiprocessors()) * kBlockM * kBlockN * sizeof(float);
}

bool fused_gemm_runs_here() {
  int device = 0, major = 0, minor = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  ZRT_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes attributes;
  ZRT_CUDA(
      cudaFuncGetAttributes(&attributes, fused_gemm_kernel<__half, SwiGluEpilogue<__half>, 2, 1,
                                                           WeightBoxes<__half, Layout::kInOut>>));
  return attributes.binaryVersion == 90;
}

void gemm_swiglu(const FusedGemm& args, float scale, cudaStream_t stream) {
  if (args.n % 128 != 0)
    throw std::invalid_argument("gemm_swiglu: expected a multiple of 64 as n / 2");
  for_operand_type(args.type,
                   [&](auto tag) { swiglu_product<decltype(tag)>(args, scale, stream); });
}

void gemm_qk_norm_rope(const FusedGemm& args, const FusedQkNormRope& heads, cudaStream_t stream) {
  if (args.n % 128 != 0)
    throw std::invalid_argument("gemm_qk_norm_rope: expected heads of 128 columns");
  for_operand_type(args.type,
                   [&](auto tag) { qk_norm_rope_product<decltype(tag)>(args, heads, stream); });
}

void gemm_8bit(const FusedGemm& args, float alpha, cudaStream_t stream) {
  for_8bit_type(args.type, [&](auto tag) { plain_product<decltype(tag)>(args, alpha, stream); });
}

}  // namespace zimage_rt
