#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>

#include "device/check.h"
#include "device/matrix.h"
#include "kernels/early_start.cuh"
#include "kernels/norm.h"
#include "kernels/numeric.cuh"
#include "kernels/quantize.cuh"

namespace zimage_rt {
namespace {

// One block per row, eight values per thread: a row is read once, kept in registers, written once.
// Three blocks per multiprocessor keep enough loads in flight for the full bandwidth.
constexpr int kThreads = 512;
constexpr int kBlocks = 3;

// Outputs of a norm. `write` takes the eight values of each thread of a block, which holds a row.
template <typename T>
struct PlainOutput {
  T* out;
  __device__ void write(const float (&values)[8], int dim) const {
    const int i = threadIdx.x * 8;
    if (i < dim) store8(out + static_cast<std::size_t>(blockIdx.x) * dim + i, values);
  }
};
template <typename Q>
struct QuantizedOutput {
  QuantizedRows rows;
  __device__ void write(const float (&values)[8], int dim) const {
    float row[1][8];
#pragma unroll
    for (int j = 0; j < 8; ++j) row[0][j] = values[j];
    quantize_row<Q>(row, rows, static_cast<int>(blockIdx.x), dim);
  }
};

template <typename Output>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rms_norm_kernel(const float* x, const float* weight, Output out, int dim, float eps) {
  __shared__ float scratch[32];
  allow_early_start();
  wait_for_previous_kernel();
  const int i = threadIdx.x * 8;
  const std::size_t at = static_cast<std::size_t>(blockIdx.x) * dim + i;
  float values[8] = {};
  if (i < dim) load8(x + at, values);
  float sum = 0.0f;
#pragma unroll
  for (const float value : values) sum += value * value;
  const float factor = rsqrtf(block_sum(sum, scratch) / dim + eps);
  float weights[8] = {};
  if (i < dim) load8(weight + i, weights);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] *= factor * weights[j];
  out.write(values, dim);
}

template <typename T, bool kPost, bool kPre, typename Output>
__global__ void __launch_bounds__(kThreads, kBlocks)
    residual_norm_kernel(float* x, const T* branch, const float* post, float post_eps,
                         float branch_scale, const float* pre, float pre_eps, Output out, int dim) {
  __shared__ float scratch[2][32];
  allow_early_start();
  wait_for_previous_kernel();
  const int i = threadIdx.x * 8;
  const std::size_t at = static_cast<std::size_t>(blockIdx.x) * dim + i;
  const bool active = i < dim;
  float values[8] = {}, added[8] = {}, vector[8] = {};
  if (active) {
    load8(branch + at, added);
    load8(static_cast<const float*>(x) + at, values);
    if (kPost) load8(post + i, vector);
  }
  float factor = branch_scale;
  if (kPost) {
    float sum = 0.0f;
#pragma unroll
    for (const float value : added) sum += value * value;
    factor = rsqrtf(block_sum(sum, scratch[0]) / dim + post_eps);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] += added[j] * factor * (kPost ? vector[j] : 1.0f);
  if (active) store8(x + at, values);
  if (!kPre) return;
  if (active) load8(pre + i, vector);
  float sum = 0.0f;
#pragma unroll
  for (const float value : values) sum += value * value;
  factor = rsqrtf(block_sum(sum, scratch[1]) / dim + pre_eps);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] *= factor * vector[j];
  out.write(values, dim);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    layer_norm_kernel(const float* x, const float* scale, T* out, int dim, float eps) {
  __shared__ float scratch[2][32];
  const int i = threadIdx.x * 8;
  const std::size_t at = static_cast<std::size_t>(blockIdx.x) * dim + i;
  float values[8] = {};
  if (i < dim) load8(x + at, values);
  float sum = 0.0f;
#pragma unroll
  for (const float value : values) sum += value;
  const float mean = block_sum(sum, scratch[0]) / dim;
  float squares = 0.0f;
#pragma unroll
  for (float& value : values) {
    value = i < dim ? value - mean : 0.0f;
    squares += value * value;
  }
  const float factor = rsqrtf(block_sum(squares, scratch[1]) / dim + eps);
  if (i >= dim) return;
  float vector[8];
  load8(scale + i, vector);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] *= factor * vector[j];
  store8(out + at, values);
}

int threads_for(int dim) {
  if (dim % 8 != 0 || dim < 8 || dim > 8 * kThreads)
    throw std::invalid_argument("norm: expected a multiple of 8 up to 4096 as dim");
  return ceil_div(dim / 8, 32) * 32;
}

template <typename T, typename Output>
void launch_residual_norm(const ResidualNorm& args, Output out, cudaStream_t stream) {
  const int threads = threads_for(args.dim);
  if (args.rows == 0) return;
  const auto launch = [&](auto kernel) {
    launch_early(kernel, args.rows, threads, 0, 1, stream, args.x,
                 static_cast<const T*>(args.branch), args.post, args.post_eps, args.branch_scale,
                 args.pre, args.pre_eps, out, args.dim);
  };
  if (args.post != nullptr)
    args.pre != nullptr ? launch(residual_norm_kernel<T, true, true, Output>)
                        : launch(residual_norm_kernel<T, true, false, Output>);
  else
    args.pre != nullptr ? launch(residual_norm_kernel<T, false, true, Output>)
                        : launch(residual_norm_kernel<T, false, false, Output>);
}

}  // namespace

void rms_norm(const RmsNorm& args, cudaStream_t stream) {
  const int threads = threads_for(args.dim);
  const auto launch = [&](auto out) {
    if (args.rows == 0) return;
    launch_early(rms_norm_kernel<decltype(out)>, args.rows, threads, 0, 1, stream, args.x,
                 args.weight, out, args.dim, args.eps);
  };
  if (args.quantized.data != nullptr) {
    check_quantized_columns(args.dim, args.quantized);
    for_8bit_type(args.quantized.dtype, [&](auto tag) {
      launch(QuantizedOutput<decltype(tag)>{.rows = args.quantized});
    });
  } else {
    for_type(args.type, [&](auto tag) {
      using T = decltype(tag);
      launch(PlainOutput<T>{.out = static_cast<T*>(args.out)});
    });
  }
}

void residual_norm(const ResidualNorm& args, cudaStream_t stream) {
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    if (args.quantized.data == nullptr || args.pre == nullptr) {
      launch_residual_norm<T>(args, PlainOutput<T>{.out = static_cast<T*>(args.out)}, stream);
      return;
    }
    check_quantized_columns(args.dim, args.quantized);
    for_8bit_type(args.quantized.dtype, [&](auto format) {
      launch_residual_norm<T>(args, QuantizedOutput<decltype(format)>{.rows = args.quantized},
                              stream);
    });
  });
}

void layer_norm(const LayerNorm& args, cudaStream_t stream) {
  const int threads = threads_for(args.dim);
  if (args.rows == 0) return;
  for_half_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    layer_norm_kernel<T><<<args.rows, threads, 0, stream>>>(
        args.x, args.scale, static_cast<T*>(args.out), args.dim, args.eps);
  });
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
