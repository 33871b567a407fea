#pragma once

#include <cuda_runtime_api.h>

namespace zimage_rt {

class CublasLtGemm;
class CudnnAttention;

// The context of every operation: libraries, the stream, and shared workspace.
struct Ops {
  CublasLtGemm& gemm;
  CudnnAttention* cudnn;  // null: our own kernel alone
  cudaStream_t stream;
  void* fused_workspace;            // of kernels/fused_gemm.h; null: cuBLASLt alone
  void* split_workspace = nullptr;  // of kernels/mma_gemm_8bit.h, which may be null there
};

}  // namespace zimage_rt
