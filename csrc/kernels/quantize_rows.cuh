#pragma once

// The kernel that quantises rows from any source in one pass.

#include <cuda_runtime.h>

#include <stdexcept>

#include "device/check.h"
#include "device/matrix.h"
#include "kernels/early_start.cuh"
#include "kernels/numeric.cuh"
#include "kernels/quantize.cuh"
#include "kernels/quantize_rows.h"

namespace zimage_rt {

constexpr int kQuantizeThreads = 512;
// Up to so many rows, which do not fill the device, are spread over more threads.
constexpr int kQuantizeFewRows = 256;

// One block per row, which stays in registers: kVectors times eight values per thread.
// `source.load(row, column, values)` reads eight values.
template <typename Q, int kVectors, typename Source, int kThreads = kQuantizeThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    quantize_rows_kernel(const Source source, const QuantizedRows out, int columns) {
  allow_early_start();
  wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x);
  float values[kVectors][8] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = 8 * (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
    if (column < columns) source.load(row, column, values[v]);
  }
  quantize_row<Q>(values, out, row, columns);
}

// Throws std::invalid_argument for columns that `QuantizeRows` does not allow.
template <typename Source>
void launch_quantize_rows(const Source& source, const QuantizedRows& out, int rows, int columns,
                          cudaStream_t stream) {
  check_quantized_columns(columns, out);
  if (columns > kQuantizedColumns)
    throw std::invalid_argument("8-bit rows: expected at most 16384 columns");
  const int vectors = columns / 8;
  for_8bit_type(out.dtype, [&](auto tag) {
    using Q = decltype(tag);
    const auto launch = [&](auto kernel, int per_thread) {
      launch_early(kernel, rows, ceil_div(ceil_div(vectors, per_thread), 32) * 32, 0, 1, stream,
                   source, out, columns);
    };
    if (vectors <= kQuantizeThreads)
      launch(quantize_rows_kernel<Q, 1, Source>, 1);
    else if (rows <= kQuantizeFewRows)
      launch(quantize_rows_kernel<Q, 2, Source, 2 * kQuantizeThreads>, 2);
    else if (vectors <= 2 * kQuantizeThreads)
      launch(quantize_rows_kernel<Q, 2, Source>, 2);
    else
      launch(quantize_rows_kernel<Q, 4, Source>, 4);
  });
}

}  // namespace zimage_rt
