#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/quantize_rows.cuh"
#include "kernels/swiglu.h"

namespace zimage_rt {
namespace {

// gate = silu(gate) * up * scale
__device__ inline void swiglu8(float (&gate)[8], const float (&up)[8], float scale) {
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * (up[j] * scale);
}

template <typename T>
__global__ void swiglu_kernel(const T* gate_up, T* out, int rows, int vectors, float scale) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned row = at / vectors, vector = at % vectors;
  if (row >= rows) return;
  const std::size_t hidden = std::size_t{8} * vectors;
  float gate[8], up[8];
  load8(gate_up + row * 2 * hidden + vector * 8, gate);
  load8(gate_up + row * 2 * hidden + hidden + vector * 8, up);
  swiglu8(gate, up, scale);
  store8(out + row * hidden + vector * 8, gate);
}

// Rows of the result, for quantisation.
template <typename T>
struct SwiGluRows {
  const T* gate_up;
  int hidden;
  float scale;
  __device__ void load(int row, int column, float (&values)[8]) const {
    const T* const gate = gate_up + static_cast<std::size_t>(row) * 2 * hidden + column;
    float up[8];
    load8(gate, values);
    load8(gate + hidden, up);
    swiglu8(values, up, scale);
  }
};

}  // namespace

void swiglu(const SwiGlu& args, cudaStream_t stream) {
  if (args.hidden % 8 != 0) throw std::invalid_argument("swiglu: expected a multiple of 8");
  if (args.rows == 0) return;
  if (args.quantized.data != nullptr) {
    for_half_type(args.type, [&](auto tag) {
      using T = decltype(tag);
      launch_quantize_rows(SwiGluRows<T>{.gate_up = static_cast<const T*>(args.gate_up),
                                         .hidden = args.hidden,
                                         .scale = args.gate_scale * args.up_scale},
                           args.quantized, args.rows, args.hidden, stream);
    });
    return;
  }
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
