#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/numeric.cuh"
#include "kernels/quantize_rows.cuh"
#include "kernels/quantize_rows.h"

namespace zimage_rt {
namespace {

template <typename T>
struct MatrixRows {
  const T* x;
  int columns;
  __device__ void load(int row, int column, float (&values)[8]) const {
    load8(x + static_cast<std::size_t>(row) * columns + column, values);
  }
};

}  // namespace

void quantize_rows(const QuantizeRows& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    launch_quantize_rows(MatrixRows<T>{.x = static_cast<const T*>(args.x), .columns = args.columns},
                         args.out, args.rows, args.columns, stream);
  });
}

}  // namespace zimage_rt
