#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// fp32 [batch, channels, height, width] -> 16-bit [batch, height, width, 16], the input of the
// autoencoder's first convolutions. Channels beyond `channels` (at most 16) are zero.
struct NchwToNhwc16 {
  const float* input = nullptr;
  void* output = nullptr;
  DType dtype = DType::kBFloat16;
  int batch = 1, channels = 16, height = 0, width = 0;
};

// x = input * scale + shift.
void scale_to_nhwc(const NchwToNhwc16& args, float scale, float shift, cudaStream_t stream);

// Tiny decoder: x = latents / scaling_factor + shift_factor, then tanh(x / 3) * 3.
void unscale_latents_to_nhwc(const NchwToNhwc16& args, float scaling_factor, float shift_factor,
                             cudaStream_t stream);

// Tiny encoder: (image + 1) / 2.
void image_to_nhwc(const NchwToNhwc16& args, cudaStream_t stream);

// The same from the bytes of an image [pixels, channels]: bit for bit image_to_nhwc of
// byte / 127.5 - 1.
void uint8_to_nhwc(const std::uint8_t* input, void* output, DType dtype, int channels,
                   std::int64_t pixels, cudaStream_t stream);
// byte / 127.5 - 1.
void uint8_to_signed_nhwc(const std::uint8_t* input, void* output, DType dtype, int channels,
                          std::int64_t pixels, cudaStream_t stream);

}  // namespace zimage_rt
