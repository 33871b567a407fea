#include "device/device.h"

#include <cstddef>
#include <string>

#include "device/check.h"

namespace zimage_rt {
namespace {

std::string megabytes(std::size_t bytes) { return std::to_string((bytes + 999999) / 1000000); }

}  // namespace

OutOfMemoryError::OutOfMemoryError(const std::string& what, std::size_t needed, std::size_t free)
    : CudaError(what + ": needed " + megabytes(needed) + " MB of device memory, " +
                megabytes(free) + " MB are free") {}

OutOfMemoryError::OutOfMemoryError(const std::string& what, std::size_t needed, std::size_t free,
                                   std::size_t least_limit)
    : CudaError(OutOfMemoryError(what + " (memory_limit)", needed, free).what() +
                std::string("; a memory_limit of at least ") + std::to_string(least_limit) +
                " bytes would do") {}

HostMemoryError::HostMemoryError(std::size_t needed)
    : CudaError("needed " + megabytes(needed) +
                " MB more of page-locked memory on the host, which has too little") {}

void throw_cuda_error(cudaError_t status, const char* call, const char* file, int line) {
  // Reset the error, or the next launch would report it again.
  cudaGetLastError();
  const std::string path = file;
  throw CudaError(std::string(call) + ": " + cudaGetErrorString(status) + " (" +
                  path.substr(path.rfind("csrc/") == std::string::npos ? 0 : path.rfind("csrc/")) +
                  ":" + std::to_string(line) + ")");
}

DeviceBuffer::DeviceBuffer(std::size_t bytes, const char* purpose) {
  if (bytes == 0) return;
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    ZRT_CUDA(cudaMemGetInfo(&free, &total));
    throw OutOfMemoryError(purpose, bytes, free);
  }
  ZRT_CUDA(status);
  data_ = static_cast<std::byte*>(data);
  bytes_ = bytes;
}

int multiprocessors() {
  int device = 0, count = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

DeviceBuffer DeviceBuffer::zeroed(std::size_t bytes, const char* purpose) {
  DeviceBuffer buffer(bytes, purpose);
  ZRT_CUDA(cudaMemset(buffer.data(), 0, bytes));
  return buffer;
}

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

void DeviceBuffer::release() { DeviceBuffer().swap(*this); }

PinnedBuffer::PinnedBuffer(std::size_t bytes) : bytes_(bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMallocHost(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw HostMemoryError(bytes);
  }
  ZRT_CUDA(status);
  data_ = static_cast<std::byte*>(data);
}

PinnedBuffer::~PinnedBuffer() { cudaFreeHost(data_); }

Stream::Stream() { ZRT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }

Stream::~Stream() { cudaStreamDestroy(stream_); }

void Stream::synchronize() const { ZRT_CUDA(cudaStreamSynchronize(stream_)); }

Event::Event() { ZRT_CUDA(cudaEventCreate(&event_)); }

Event::~Event() { cudaEventDestroy(event_); }

float Event::since(const Event& start) const {
  float milliseconds = 0.0f;
  ZRT_CUDA(cudaEventElapsedTime(&milliseconds, start.event_, event_));
  return milliseconds;
}

GraphExec::GraphExec(cudaGraph_t graph) { ZRT_CUDA(cudaGraphInstantiate(&exec_, graph, 0)); }

GraphExec::~GraphExec() {
  if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
}

void GraphExec::launch(cudaStream_t stream) const { ZRT_CUDA(cudaGraphLaunch(exec_, stream)); }

DeviceGuard::DeviceGuard(int device) {
  ZRT_CUDA(cudaGetDevice(&previous_));
  ZRT_CUDA(cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

}  // namespace zimage_rt
