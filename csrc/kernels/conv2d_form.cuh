#pragma once

// A convolution as one or four products over grids of pixels: the geometry that both kernels of
// conv2d.h and the packing of their weights share.

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/conv2d.h"
#include "kernels/numeric.cuh"

namespace zimage_rt::conv2d_detail {

// Input channels of one step along k: 128 bytes. Each tap's channels are padded to it.
constexpr int kChunk = 64;
// Pixels of a tile; the widest box of both kernels.
constexpr int kTileWidth = 16, kTileHeight = 8;
constexpr int kTilePixels = kTileWidth * kTileHeight;

constexpr int chunks_of(int channels) { return ceil_div(channels, kChunk); }
// Products of a convolution: k3x3Up has one per parity of the output's row and column.
constexpr int forms_of(Conv2dKind kind) { return kind == Conv2dKind::k3x3Up ? 4 : 1; }
// Taps of a form along one axis.
constexpr int taps_of(Conv2dKind kind) {
  return kind == Conv2dKind::k1x1 ? 1 : kind == Conv2dKind::k3x3Up ? 2 : 3;
}

// Pixel (y, x) of the grid reads input pixels (y * stride + origin_y + i, x * stride + origin_x +
// j) with i and j below `taps`, and is pixel (y * out_step + out_y, x * out_step + out_x) of the
// output.
struct Form {
  int taps, stride, origin_y, origin_x;
  int grid_height, grid_width;
  int in_height, in_width, in_channels, chunks;
  int out_step, out_y, out_x;
  int out_height, out_width, out_channels;

  __host__ __device__ int k_tiles() const { return taps * taps * chunks; }
};

inline Form form_of(const Conv2d& args, int index) {
  const bool up = args.kind == Conv2dKind::k3x3Up;
  const int parity_y = index / 2, parity_x = index % 2;
  const int padding = args.kind == Conv2dKind::k3x3 ? -1 : 0;
  return {.taps = taps_of(args.kind),
          .stride = args.kind == Conv2dKind::k3x3Down ? 2 : 1,
          .origin_y = up ? parity_y - 1 : padding,
          .origin_x = up ? parity_x - 1 : padding,
          .grid_height = up ? args.height : args.out_height(),
          .grid_width = up ? args.width : args.out_width(),
          .in_height = args.height,
          .in_width = args.width,
          .in_channels = args.in_channels,
          .chunks = chunks_of(args.in_channels),
          .out_step = up ? 2 : 1,
          .out_y = parity_y,
          .out_x = parity_x,
          .out_height = args.out_height(),
          .out_width = args.out_width(),
          .out_channels = args.out_channels};
}

// Elements of one form's packed weights, [out_channels, taps, taps, chunks * kChunk].
constexpr std::size_t form_elements(Conv2dKind kind, int in_channels, int out_channels) {
  return static_cast<std::size_t>(out_channels) * taps_of(kind) * taps_of(kind) *
         chunks_of(in_channels) * kChunk;
}

// The packed weights of form `index`, and the bias after those of all forms.
inline const std::byte* form_weights(const Conv2d& args, int index) {
  return static_cast<const std::byte*>(args.packed) +
         index * form_elements(args.kind, args.in_channels, args.out_channels) * 2;
}
inline const float* packed_bias(const Conv2d& args) {
  return reinterpret_cast<const float*>(form_weights(args, forms_of(args.kind)));
}

// Throws std::invalid_argument for what neither kernel computes.
void check(const Conv2d& args);

// What is done with a sum. `T` is the format of 16-bit outputs.
struct Target {
  Conv2dOutput kind;
  const void* residual;
  void* output;
  const float* bias;
  float sum_scale, bias_scale, shift;
  int* not_finite;
  ChannelSums* sums;  // of this form's first part

  __device__ float offset(int channel) const { return bias[channel] * bias_scale + shift; }
};

inline Target target_of(const Conv2d& args, int first_part) {
  ChannelSums* const sums =
      args.sums == nullptr ? nullptr
                           : args.sums + static_cast<std::size_t>(first_part) * args.out_channels;
  return {.kind = args.output_kind,
          .residual = args.residual,
          .output = args.output,
          .bias = packed_bias(args),
          .sum_scale = args.sum_scale,
          .bias_scale = args.bias_scale,
          .shift = args.shift,
          .not_finite = args.not_finite,
          .sums = sums};
}

// The index of a grid's pixel in the output.
__device__ inline std::int64_t out_pixel(const Form& form, int y, int x) {
  return static_cast<std::int64_t>(y * form.out_step + form.out_y) * form.out_width +
         x * form.out_step + form.out_x;
}

// Stores one value as fp32 plane or as a byte.
__device__ inline void store_single(const Form& form, const Target& target, int channel,
                                    std::int64_t pixel, float value) {
  if (target.kind == Conv2dOutput::kFloat) {
    const std::int64_t plane = static_cast<std::int64_t>(form.out_height) * form.out_width;
    static_cast<float*>(target.output)[channel * plane + pixel] = value;
    return;
  }
  if (!isfinite(value) && target.not_finite != nullptr) *target.not_finite = 1;
  static_cast<std::uint8_t*>(target.output)[pixel * form.out_channels + channel] =
      image_to_uint8(value);
}

}  // namespace zimage_rt::conv2d_detail
