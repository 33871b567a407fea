#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "device/check.h"
#include "device/dtype.h"
#include "kernels/tensor_map.h"

namespace zimage_rt {
namespace {

CUtensorMapDataType tensor_map_type(DType type) {
  switch (type) {
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace

CUtensorMap encode_tensor_map(const void* data, DType type, const TensorAxes& axes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    ZRT_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw CudaError("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&::cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint32_t one[] = {1, 1, 1};
  const CUresult status =
      encode(&map, tensor_map_type(type), 3, const_cast<void*>(data), axes.size, axes.stride,
             axes.box, one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw CudaError("cuTensorMapEncodeTiled failed with status " + std::to_string(status));
  return map;
}

CUtensorMap tensor_map(const void* data, DType type, int rows, int columns, int box_rows,
                       int boxes) {
  const auto wide = [](auto value) { return static_cast<cuuint64_t>(value); };
  // A load of a single box needs no third dimension: the strip is the whole matrix.
  const bool stripped = boxes > 1;
  const int strip = kTensorMapRowBytes / static_cast<int>(size_of(type));
  return encode_tensor_map(
      data, type,
      {.size = {wide(stripped ? strip : columns), wide(rows), wide(stripped ? columns / strip : 1)},
       .stride = {wide(columns) * size_of(type), wide(kTensorMapRowBytes)},
       .box = {static_cast<cuuint32_t>(strip), static_cast<cuuint32_t>(box_rows),
               static_cast<cuuint32_t>(boxes)}});
}

}  // namespace zimage_rt
