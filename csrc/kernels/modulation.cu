#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>

#include "device/check.h"
#include "kernels/modulation.h"
#include "kernels/numeric.cuh"

namespace zimage_rt {
namespace {

constexpr int kMaxWidth = kMaxModulationWidth;
constexpr int kThreads = 128;
// Steps per thread: the weights are read once for all of them.
constexpr int kSteps = 8;

__device__ float silu(float x) { return x / (1.0f + expf(-x)); }

// One block per step, one thread per unit of the middle layer.
template <typename T>
__global__ void timestep_embedding_kernel(TimestepEmbedding args) {
  extern __shared__ float shared[];
  float* const features = shared;                // [2 * half]
  float* const middle = shared + 2 * args.half;  // [middle]
  const float t = args.timesteps[blockIdx.x] * args.t_scale;
  for (int i = threadIdx.x; i < args.half; i += blockDim.x) {
    const float angle = t * args.frequencies[i];
    features[i] = cosf(angle);
    features[args.half + i] = sinf(angle);
  }
  __syncthreads();
  const T* const weight1 = static_cast<const T*>(args.weight1);
  for (int j = threadIdx.x; j < args.middle; j += blockDim.x) {
    float sum = args.bias1[j];
    for (int i = 0; i < 2 * args.half; ++i)
      sum += features[i] * static_cast<float>(weight1[i * args.middle + j]);
    middle[j] = silu(sum);
  }
  __syncthreads();
  const T* const weight2 = static_cast<const T*>(args.weight2);
  for (int j = threadIdx.x; j < args.width; j += blockDim.x) {
    float sum = args.bias2[j];
    for (int i = 0; i < args.middle; ++i)
      sum += middle[i] * static_cast<float>(weight2[i * args.width + j]);
    args.out[blockIdx.x * args.width + j] = sum;
  }
}

// sums[s][j] = bias[column + j] + sum over i of inputs[s][i] * weight[i][column + j]: eight columns
// of a matrix [width, columns], for up to kSteps inputs in shared memory.
template <typename T>
__device__ void eight_columns(const float (*inputs)[kMaxWidth], const T* weight, const float* bias,
                              int width, int columns, int column, float (&sums)[kSteps][8]) {
  float start[8];
  load8(bias + column, start);
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[s][j] = start[j];
#pragma unroll 4
  for (int i = 0; i < width; ++i) {
    float row[8];
    load8(weight + static_cast<std::size_t>(i) * columns + column, row);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[s][j] += inputs[s][i] * row[j];
  }
}

template <bool kSilu>
__device__ void read_inputs(float (*inputs)[kMaxWidth], const float* embedding, int width,
                            int first, int steps) {
  for (int i = threadIdx.x; i < kSteps * width; i += blockDim.x) {
    const int s = i / width, step = first + s;
    const float value = step < steps ? embedding[step * width + i % width] : 0.0f;
    inputs[s][i % width] = kSilu ? silu(value) : value;
  }
  __syncthreads();
}

template <typename T>
__global__ void modulation_kernel(Modulation args) {
  __shared__ float inputs[kSteps][kMaxWidth];
  const int first = blockIdx.z * kSteps;
  read_inputs<false>(inputs, args.embedding, args.width, first, args.steps);
  const int column = (blockIdx.x * kThreads + threadIdx.x) * 8;
  if (column >= 4 * args.dim) return;
  const ModulatedBlock block = args.blocks[blockIdx.y];
  float sums[kSteps][8];
  eight_columns(inputs, static_cast<const T*>(block.weight), block.bias, args.width, 4 * args.dim,
                column, sums);
  const int part = column / args.dim;  // all eight columns: dim is a multiple of 8
  float norm[8];
  load8(block.norms[part] + column % args.dim, norm);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (first + s >= args.steps) break;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      sums[s][j] = norm[j] * (part % 2 == 0 ? 1.0f + sums[s][j] : tanhf(sums[s][j]));
    const std::size_t row = static_cast<std::size_t>(first + s) * args.block_count + blockIdx.y;
    store8(args.vectors + row * 4 * args.dim + column, sums[s]);
  }
}

template <typename T>
__global__ void final_modulation_kernel(FinalModulation args) {
  __shared__ float inputs[kSteps][kMaxWidth];
  const int first = blockIdx.z * kSteps;
  read_inputs<true>(inputs, args.embedding, args.width, first, args.steps);
  const int column = (blockIdx.x * kThreads + threadIdx.x) * 8;
  if (column >= args.dim) return;
  float sums[kSteps][8];
  eight_columns(inputs, static_cast<const T*>(args.weight), args.bias, args.width, args.dim, column,
                sums);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (first + s >= args.steps) break;
#pragma unroll
    for (float& sum : sums[s]) sum += 1.0f;
    store8(args.scales + static_cast<std::size_t>(first + s) * args.dim + column, sums[s]);
  }
}

void check_sizes(int width, int dim) {
  if (width > kMaxWidth || dim % 8 != 0)
    throw std::invalid_argument("modulation: expected a width of at most 256, dim a multiple of 8");
}

}  // namespace

void timestep_embedding(const TimestepEmbedding& args, cudaStream_t stream) {
  const std::size_t shared = sizeof(float) * (2 * args.half + args.middle);
  if (shared > 48 * 1024) throw std::invalid_argument("timestep_embedding: layers too wide");
  for_half_type(args.type, [&](auto tag) {
    timestep_embedding_kernel<decltype(tag)><<<args.steps, 1024, shared, stream>>>(args);
  });
  ZRT_LAUNCHED();
}

void modulation(const Modulation& args, cudaStream_t stream) {
  check_sizes(args.width, args.dim);
  const dim3 grid(ceil_div(4 * args.dim / 8, kThreads), args.block_count,
                  ceil_div(args.steps, kSteps));
  for_half_type(args.type, [&](auto tag) {
    modulation_kernel<decltype(tag)><<<grid, kThreads, 0, stream>>>(args);
  });
  ZRT_LAUNCHED();
}

void final_modulation(const FinalModulation& args, cudaStream_t stream) {
  check_sizes(args.width, args.dim);
  const dim3 grid(ceil_div(args.dim / 8, kThreads), 1, ceil_div(args.steps, kSteps));
  for_half_type(args.type, [&](auto tag) {
    final_modulation_kernel<decltype(tag)><<<grid, kThreads, 0, stream>>>(args);
  });
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
