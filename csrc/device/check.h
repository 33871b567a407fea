#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace zimage_rt {

// A CUDA, cuBLASLt or cuDNN call failed; the text says which, where and why.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device has too little memory. Nothing was changed; the caller may go on with less.
struct OutOfMemoryError : CudaError {
  OutOfMemoryError(const std::string& what, std::size_t needed, std::size_t free);
};

// The bundle's weights are not what the program expects.
struct WeightError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void throw_cuda_error(cudaError_t status, const char* call, const char* file,
                                   int line);

}  // namespace zimage_rt

#define ZRT_CUDA(call)                                                      \
  do {                                                                      \
    const cudaError_t zrt_status = (call);                                  \
    if (zrt_status != cudaSuccess)                                          \
      ::zimage_rt::throw_cuda_error(zrt_status, #call, __FILE__, __LINE__); \
  } while (0)

// After a kernel launch: a wrong launch configuration shows here.
#define ZRT_LAUNCHED() ZRT_CUDA(cudaGetLastError())
