#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// matrix[rows, first_column … first_column + columns] += downᵀ @ up + delta, summed in fp32 and
// rounded once. Sets *overflow to 1 if the format cannot hold a result.
struct LowRankUpdate {
  void* matrix;  // [rows, stride]
  DType type;
  int rows;
  std::int64_t stride;
  std::int64_t first_column;
  int columns;
  int rank;
  const float* down;  // [rank, rows]
  const float* up;    // [rank, columns]
  int* overflow;
  // A dense change, or null: element (row, column) is delta[row * delta_row + column *
  // delta_column].
  const float* delta = nullptr;
  std::int64_t delta_row = 0;
  std::int64_t delta_column = 0;
};
void low_rank_update(const LowRankUpdate& args, cudaStream_t stream);

}  // namespace zimage_rt
