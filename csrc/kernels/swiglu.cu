#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/swiglu.h"

namespace zimage_rt {
namespace {

template <typename T>
__global__ void swiglu_kernel(const T* gate_up, T* out, int rows, int vectors, float scale) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned row = at / vectors, vector = at % vectors;
  if (row >= rows) return;
  const std::size_t hidden = std::size_t{8} * vectors;
  float gate[8], up[8];
  load8(gate_up + row * 2 * hidden + vector * 8, gate);
  load8(gate_up + row * 2 * hidden + hidden + vector * 8, up);
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * (up[j] * scale);
  store8(out + row * hidden + vector * 8, gate);
}

}  // namespace

void swiglu(const SwiGlu& args, cudaStream_t stream) {
  if (args.hidden % 8 != 0) throw std::invalid_argument("swiglu: expected a multiple of 8");
  if (args.rows == 0) return;
  const int vectors = args.hidden / 8;
  const std::int64_t threads = static_cast<std::int64_t>(args.rows) * vectors;
  if (threads >= std::int64_t{1} << 32) throw std::invalid_argument("swiglu: too many rows");
  const auto blocks = static_cast<unsigned>((threads + 255) / 256);
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    swiglu_kernel<T><<<blocks, 256, 0, stream>>>(static_cast<const T*>(args.gate_up),
                                                 static_cast<T*>(args.out), args.rows, vectors,
                                                 args.gate_scale * args.up_scale);
  });
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
