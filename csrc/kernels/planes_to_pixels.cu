#include <string>

#include "kernels/numeric.cuh"
#include "kernels/planes_to_pixels.h"
#include "zimage_rt/check.h"

namespace zimage_rt {
namespace {

constexpr int kPixelChannels = 16;

struct Latents {
  float inverse_scaling, shift;
  __device__ float operator()(float value) const {
    return tanhf((value * inverse_scaling + shift) / 3.0f) * 3.0f;
  }
};

struct Image {
  __device__ float operator()(float value) const { return (value + 1.0f) * 0.5f; }
};

// A thread a pixel: neighbours in a warp read neighbours of a plane and write 32 bytes each.
template <typename T, typename Map>
__global__ void planes_to_pixels_kernel(const float* input, T* output, int channels,
                                        std::int64_t plane, std::int64_t pixels, Map map) {
  const std::int64_t pixel = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixels) return;
  const float* source = input + pixel / plane * channels * plane + pixel % plane;
  T* target = output + pixel * kPixelChannels;
#pragma unroll
  for (int first = 0; first < kPixelChannels; first += 8) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values[i] = first + i < channels ? map(source[(first + i) * plane]) : 0.0f;
    store8(target + first, values);
  }
}

template <typename Map>
void launch(const PlanesToPixels& args, Map map, cudaStream_t stream) {
  if (args.channels < 1 || args.channels > kPixelChannels)
    throw std::invalid_argument("planes_to_pixels: expected 1 to 16 channels, got " +
                                std::to_string(args.channels));
  const std::int64_t plane = static_cast<std::int64_t>(args.height) * args.width;
  const std::int64_t pixels = args.batch * plane;
  if (pixels == 0) return;
  constexpr int kThreads = 128;
  const auto blocks = static_cast<unsigned>((pixels + kThreads - 1) / kThreads);
  for_half_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    planes_to_pixels_kernel<T><<<blocks, kThreads, 0, stream>>>(
        args.input, static_cast<T*>(args.output), args.channels, plane, pixels, map);
    ZRT_LAUNCHED();
  });
}

}  // namespace

void latents_to_pixels(const PlanesToPixels& args, float scaling_factor, float shift_factor,
                       cudaStream_t stream) {
  launch(args, Latents{1.0f / scaling_factor, shift_factor}, stream);
}

void image_to_pixels(const PlanesToPixels& args, cudaStream_t stream) {
  launch(args, Image{}, stream);
}

}  // namespace zimage_rt
