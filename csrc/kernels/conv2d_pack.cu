#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device/check.h"
#include "kernels/conv2d.h"
#include "kernels/conv2d_form.cuh"
#include "kernels/numeric.cuh"

namespace zimage_rt {
namespace {

using namespace conv2d_detail;

constexpr int kThreads = 256;

struct Source {
  Conv2dKind kind;
  int in_channels, out_channels, chunks;
  std::int64_t out_stride, in_stride;
};

// The taps of a 3x3 convolution that read, for the parity of an output row (or column), the i-th of
// the two input rows: 2y + parity + tap - 1 is in row (y + parity - 1 + i) of those doubled.
__device__ inline void taps_read(int parity, int i, int& first, int& last) {
  if (parity == 0)
    first = i == 0 ? 0 : 1, last = i == 0 ? 0 : 2;
  else
    first = i == 0 ? 0 : 2, last = i == 0 ? 1 : 2;
}

// One thread per packed element, [forms][out_channels][taps][taps][chunks * kChunk].
template <typename S, typename T>
__global__ void pack_kernel(const Source source, const S* weight, T* packed, std::int64_t count) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int taps = taps_of(source.kind), width = source.chunks * kChunk;
  const int in = static_cast<int>(index % width);
  const int x = static_cast<int>(index / width % taps);
  const int y = static_cast<int>(index / width / taps % taps);
  const std::int64_t row = index / width / (taps * taps);
  const auto out = static_cast<int>(row % source.out_channels);
  const auto form = static_cast<int>(row / source.out_channels);
  float value = 0.0f;
  if (in < source.in_channels) {
    const S* const kernel = weight + out * source.out_stride + in * source.in_stride;
    if (source.kind == Conv2dKind::k3x3Up) {
      int first_y, last_y, first_x, last_x;
      taps_read(form / 2, y, first_y, last_y);
      taps_read(form % 2, x, first_x, last_x);
      for (int i = first_y; i <= last_y; ++i)
        for (int j = first_x; j <= last_x; ++j) value += static_cast<float>(kernel[3 * i + j]);
    } else {
      value = static_cast<float>(kernel[3 * y + x]);
    }
  }
  packed[index] = static_cast<T>(value);
}

template <typename S>
__global__ void widen_kernel(const S* bias, float* packed, int count) {
  const int index = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (index < count) packed[index] = bias == nullptr ? 0.0f : static_cast<float>(bias[index]);
}

unsigned blocks_for(std::int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

std::int64_t packed_elements(Conv2dKind kind, int in_channels, int out_channels) {
  return forms_of(kind) * static_cast<std::int64_t>(form_elements(kind, in_channels, out_channels));
}

}  // namespace

std::size_t conv2d_packed_bytes(Conv2dKind kind, int in_channels, int out_channels) {
  return static_cast<std::size_t>(packed_elements(kind, in_channels, out_channels)) * 2 +
         static_cast<std::size_t>(out_channels) * sizeof(float);
}

void conv2d_pack(const Conv2dWeights& weights, DType dtype, void* packed, cudaStream_t stream) {
  if (weights.in_channels < 1 || weights.out_channels < 1)
    throw std::invalid_argument("conv2d_pack: expected one input and output channel or more");
  const std::int64_t count =
      packed_elements(weights.kind, weights.in_channels, weights.out_channels);
  const Source source{.kind = weights.kind,
                      .in_channels = weights.in_channels,
                      .out_channels = weights.out_channels,
                      .chunks = chunks_of(weights.in_channels),
                      .out_stride = weights.out_stride,
                      .in_stride = weights.in_stride};
  for_half_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* const target = static_cast<T*>(packed);
    for_type(weights.weight_type, [&](auto from) {
      using S = decltype(from);
      pack_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
          source, static_cast<const S*>(weights.weight), target, count);
      ZRT_LAUNCHED();
    });
    for_type(weights.bias_type, [&](auto from) {
      using S = decltype(from);
      widen_kernel<<<blocks_for(weights.out_channels), kThreads, 0, stream>>>(
          static_cast<const S*>(weights.bias), reinterpret_cast<float*>(target + count),
          weights.out_channels);
      ZRT_LAUNCHED();
    });
  });
}

}  // namespace zimage_rt
