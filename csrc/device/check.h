#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace zimage_rt {

// A CUDA, cuBLASLt or cuDNN call failed; the message has the call, its place and the reason.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device has too little memory. Nothing was changed; the caller may try again with less.
struct OutOfMemoryError : CudaError {
  OutOfMemoryError(const std::string& what, std::size_t needed, std::size_t free);
  // Of a limit of the caller's own: names the least that would do.
  OutOfMemoryError(const std::string& what, std::size_t needed, std::size_t free,
                   std::size_t least_limit);
};

// The host has too little memory that can be page-locked. Nothing was changed.
struct HostMemoryError : CudaError {
  explicit HostMemoryError(std::size_t needed);
};

// The weights of a bundle are not those that a model expects.
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

// After a kernel launch, to report a wrong launch configuration.
#define ZRT_LAUNCHED() ZRT_CUDA(cudaGetLastError())
