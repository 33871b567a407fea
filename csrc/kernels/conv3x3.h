#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/dtype.h"

namespace zimage_rt {

// Channels of the body, and of padded latents and images.
constexpr int kConvWideChannels = 64, kConvNarrowChannels = 16;

// 3x3 convolution with padding 1 on the tensor cores, NHWC, with fp32 sums.
//
// Channels: 64 -> 64 (the autoencoder's body), at most 16 -> 64 (its first layer) and 64 -> at most
// 16 (its last). Activations in 16 bit are [batch, height, width, channels]; inputs of 16 channels
// or fewer are padded with zeros to 16 (nchw_to_nhwc16 does it).

enum class Conv3x3Output {
  kHalf,   // [batch, out_height, out_width, 64] in the input's format
  kFloat,  // fp32 [batch, out_channels, out_height, out_width], value * scale + shift
  kUint8,  // [batch, out_height, out_width, out_channels], round(clamp(value, 0, 1) * 255)
};

struct Conv3x3 {
  const void* input = nullptr;   // [batch, height, width, 64 or 16]
  const void* packed = nullptr;  // from conv3x3_pack
  // kHalf only, null for none: added before the ReLU; may be `output`, never `input`.
  const void* residual = nullptr;
  void* output = nullptr;  // not `input`: neighbours read it
  DType dtype = DType::kBFloat16;
  Conv3x3Output kind = Conv3x3Output::kHalf;
  int batch = 1, height = 0, width = 0;
  int in_channels = 64, out_channels = 64;
  bool relu = false;
  bool upsample = false;             // nearest: the convolution reads (y / 2, x / 2) of the input
  int stride = 1;                    // 1, or 2 for 64 -> 64 without upsample
  float scale = 1.0f, shift = 0.0f;  // kFloat only
  int* not_finite = nullptr;  // kUint8 only, null for none: set to 1 if a value is not finite
  // Programmatic dependent launch, on Hopper and later: the kernel starts, and loads its weights,
  // while the previous one drains. The previous kernel must not write these weights.
  bool early_start = false;

  int out_height() const { return upsample ? 2 * height : (height - 1) / stride + 1; }
  int out_width() const { return upsample ? 2 * width : (width - 1) / stride + 1; }
};

// Throws std::invalid_argument for what it does not compute. Allocates nothing.
void conv3x3(const Conv3x3& args, cudaStream_t stream);

// Size of a layer's weights and bias as conv3x3 reads them.
std::size_t conv3x3_packed_bytes(int in_channels, int out_channels);

// weight [out_channels, in_channels, 3, 3] and bias [out_channels] (null for none), both in
// `dtype`, to the order of the tensor cores' registers (conv3x3_kernel.cuh); called once when
// weights are loaded. `packed` is 16-byte aligned.
void conv3x3_pack(const void* weight, const void* bias, DType dtype, int in_channels,
                  int out_channels, void* packed, cudaStream_t stream);

}  // namespace zimage_rt
