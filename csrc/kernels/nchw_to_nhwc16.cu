#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/check.h"
#include "kernels/nchw_to_nhwc16.h"
#include "kernels/numeric.cuh"

namespace zimage_rt {
namespace {

constexpr int kPixelChannels = 16;

struct Latents {
  float inverse_scaling, shift;
  __device__ float operator()(float value) const {
    return tanhf((value * inverse_scaling + shift) / 3.0f) * 3.0f;
  }
};

struct Scale {
  float scale, shift;
  __device__ float operator()(float value) const { return value * scale + shift; }
};

struct Image {
  __device__ float operator()(float value) const { return (value + 1.0f) * 0.5f; }
};

// Stores one pixel of the first convolution's input; missing channels are zero.
template <typename T, typename Channel>
__device__ void store_pixel(T* target, int channels, Channel channel) {
#pragma unroll
  for (int first = 0; first < kPixelChannels; first += 8) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = first + i < channels ? channel(first + i) : 0.0f;
    store8(target + first, values);
  }
}

// One thread per pixel: a warp reads consecutive values of a plane, a thread writes 32 bytes.
template <typename T, typename Map>
__global__ void nchw_to_nhwc16_kernel(const float* input, T* output, int channels,
                                      std::int64_t plane, std::int64_t pixels, Map map) {
  const std::int64_t pixel = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixels) return;
  const float* source = input + pixel / plane * channels * plane + pixel % plane;
  store_pixel(output + pixel * kPixelChannels, channels,
              [&](int i) { return map(source[i * plane]); });
}

// `map` takes values in [-1, 1].
template <typename T, typename Map>
__global__ void uint8_to_nhwc16_kernel(const std::uint8_t* input, T* output, int channels,
                                       std::int64_t pixels, Map map) {
  const std::int64_t pixel = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixels) return;
  const std::uint8_t* source = input + pixel * channels;
  store_pixel(output + pixel * kPixelChannels, channels,
              [&](int i) { return map(source[i] / 127.5f - 1.0f); });
}

void check_channels(int channels) {
  if (channels < 1 || channels > kPixelChannels)
    throw std::invalid_argument("nchw_to_nhwc16: expected 1 to 16 channels, got " +
                                std::to_string(channels));
}

constexpr int kThreads = 128;
unsigned blocks_for(std::int64_t pixels) {
  return static_cast<unsigned>((pixels + kThreads - 1) / kThreads);
}

template <typename Map>
void launch(const NchwToNhwc16& args, Map map, cudaStream_t stream) {
  check_channels(args.channels);
  const std::int64_t plane = static_cast<std::int64_t>(args.height) * args.width;
  const std::int64_t pixels = args.batch * plane;
  if (pixels == 0) return;
  for_half_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    nchw_to_nhwc16_kernel<T><<<blocks_for(pixels), kThreads, 0, stream>>>(
        args.input, static_cast<T*>(args.output), args.channels, plane, pixels, map);
    ZRT_LAUNCHED();
  });
}

template <typename Map>
void launch_bytes(const std::uint8_t* input, void* output, DType dtype, int channels,
                  std::int64_t pixels, Map map, cudaStream_t stream) {
  check_channels(channels);
  if (pixels == 0) return;
  for_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    uint8_to_nhwc16_kernel<T><<<blocks_for(pixels), kThreads, 0, stream>>>(
        input, static_cast<T*>(output), channels, pixels, map);
    ZRT_LAUNCHED();
  });
}

}  // namespace

void scale_to_nhwc(const NchwToNhwc16& args, float scale, float shift, cudaStream_t stream) {
  launch(args, Scale{.scale = scale, .shift = shift}, stream);
}

void unscale_latents_to_nhwc(const NchwToNhwc16& args, float scaling_factor, float shift_factor,
                             cudaStream_t stream) {
  launch(args, Latents{1.0f / scaling_factor, shift_factor}, stream);
}

void image_to_nhwc(const NchwToNhwc16& args, cudaStream_t stream) { launch(args, Image{}, stream); }

void uint8_to_nhwc(const std::uint8_t* input, void* output, DType dtype, int channels,
                   std::int64_t pixels, cudaStream_t stream) {
  launch_bytes(input, output, dtype, channels, pixels, Image{}, stream);
}

void uint8_to_signed_nhwc(const std::uint8_t* input, void* output, DType dtype, int channels,
                          std::int64_t pixels, cudaStream_t stream) {
  launch_bytes(input, output, dtype, channels, pixels, Scale{.scale = 1.0f, .shift = 0.0f}, stream);
}

}  // namespace zimage_rt
