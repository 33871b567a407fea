#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// fp32 planes [batch, channels, height, width] -> 16-bit pixels [batch, height, width, 16],
// channels beyond `channels` (at most 16) zero: what the autoencoder's first convolutions read.
struct PlanesToPixels {
  const float* input = nullptr;
  void* output = nullptr;
  DType dtype = DType::kBFloat16;
  int batch = 1, channels = 16, height = 0, width = 0;
};

// Decoder: own = latents / scaling_factor + shift_factor, then tanh(own / 3) * 3.
void latents_to_pixels(const PlanesToPixels& args, float scaling_factor, float shift_factor,
                       cudaStream_t stream);

// Encoder: (image + 1) / 2.
void image_to_pixels(const PlanesToPixels& args, cudaStream_t stream);

// The same from a picture's bytes [pixels, channels]: bit for bit what image_to_pixels makes of
// byte / 127.5 - 1.
void bytes_to_pixels(const std::uint8_t* input, void* output, DType dtype, int channels,
                     std::int64_t pixels, cudaStream_t stream);

}  // namespace zimage_rt
