#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// Convolutions of one image on the tensor cores, NHWC, with fp32 sums: the full autoencoder's.

enum class Conv2dKind {
  k1x1,
  k3x3,      // padding 1
  k3x3Down,  // stride 2, with a row and a column of zeros after the last ones
  k3x3Up,    // k3x3 of the input with each pixel doubled in both directions
};

enum class Conv2dOutput {
  kHalf,   // [out_height, out_width, out_channels] in the input's format
  kFloat,  // fp32 [out_channels, out_height, out_width]
  kUint8,  // [out_height, out_width, out_channels], from values in [-1, 1]
};

// The sum and the sum of squares of one channel over some pixels: part of a group norm's
// statistics.
struct alignas(8) ChannelSums {
  float sum, squares;
};

// value = sum * sum_scale + bias * bias_scale + shift (+ residual)
struct Conv2d {
  Conv2dKind kind = Conv2dKind::k3x3;
  Conv2dOutput output_kind = Conv2dOutput::kHalf;
  DType dtype = DType::kBFloat16;
  const void* input = nullptr;   // [height, width, in_channels]
  const void* packed = nullptr;  // from conv2d_pack
  // kHalf only, null for none: like the output; may be `output`, never `input`.
  const void* residual = nullptr;
  void* output = nullptr;  // not `input`: neighbours read it
  int height = 0, width = 0;
  int in_channels = 0;   // in memory: a multiple of 8; those beyond the weight's count as zeros
  int out_channels = 0;  // kHalf: a multiple of 8
  float sum_scale = 1.0f, bias_scale = 1.0f, shift = 0.0f;
  int* not_finite = nullptr;  // kUint8 only, null for none: set to 1 if a value is not finite
  // kHalf only, null for none: receives [parts, out_channels] of the output's values, before they
  // are rounded. A part has the same pixels, summed in the same order, in every run.
  ChannelSums* sums = nullptr;
  void* workspace = nullptr;  // conv2d_hopper only: of kernels/fused_gemm.h

  int out_height() const { return out_size(height); }
  int out_width() const { return out_size(width); }
  int out_size(int size) const {
    return kind == Conv2dKind::k3x3Up ? 2 * size : kind == Conv2dKind::k3x3Down ? size / 2 : size;
  }
};

// Any device from sm_80. Throws std::invalid_argument for what it does not compute, allocates
// nothing, and returns the number of parts of `sums`.
int conv2d_mma(const Conv2d& args, cudaStream_t stream);
// The same on Hopper (fused_gemm_runs_here), faster.
int conv2d_hopper(const Conv2d& args, cudaStream_t stream);
// The most parts of both.
int conv2d_max_parts(const Conv2d& args);

// A layer's weights, fp32, fp16 or bf16.
struct Conv2dWeights {
  Conv2dKind kind = Conv2dKind::k3x3;
  int in_channels = 0, out_channels = 0;
  // Element (out, in, y, x) is at out * out_stride + in * in_stride + 3 * y + x (k1x1: + 0).
  const void* weight = nullptr;
  DType weight_type = DType::kBFloat16;
  std::int64_t out_stride = 0, in_stride = 0;
  const void* bias = nullptr;  // [out_channels]
  DType bias_type = DType::kBFloat16;
};

// Size of a layer's weights and bias as the convolutions read them.
std::size_t conv2d_packed_bytes(Conv2dKind kind, int in_channels, int out_channels);

// Packs them for activations in `dtype`; called once when weights are loaded. `packed` is 16-byte
// aligned. k3x3Up becomes four 2x2 convolutions, one per parity of the output's row and column,
// because several of its nine taps read the same input pixel: their weights are added in fp32.
void conv2d_pack(const Conv2dWeights& weights, DType dtype, void* packed, cudaStream_t stream);

}  // namespace zimage_rt
