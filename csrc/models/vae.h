#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "ops/ops.h"

namespace zimage_rt {

// The output of a decoder is not finite; the message is the name of the module.
struct NotFiniteError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What every autoencoder tells of itself.
class Vae {
 public:
  virtual ~Vae() = default;
  // Pixels per latent, in each direction.
  virtual int factor() const = 0;
  virtual int latent_channels() const = 0;
  // Bytes of the workspace of one call, 16-byte aligned. The images of a batch are computed one by
  // one, in the memory of one.
  virtual std::size_t workspace_bytes(int latent_height, int latent_width) const = 0;
  // Device memory of its packed weights.
  virtual std::size_t weight_bytes() const = 0;
  // Whether it uses the workspaces in Ops, which belong to the pipeline's main stream.
  virtual bool uses_products() const = 0;
};

// Latents to images.
class VaeDecoder : public Vae {
 public:
  // latents fp32 [batch, latent_channels, latent_height, latent_width]
  // -> pixels [batch, height, width, 3]; sets `not_finite` [1] to whether a value was NaN or
  // infinite.
  virtual void decode_uint8(const float* latents, std::uint8_t* pixels, int* not_finite, int batch,
                            int latent_height, int latent_width, std::byte* workspace,
                            const Ops& ops) const = 0;
  // -> image fp32 [batch, 3, height, width] in about [-1, 1].
  virtual void decode(const float* latents, float* image, int batch, int latent_height,
                      int latent_width, std::byte* workspace, const Ops& ops) const = 0;
};

// Images to latents.
class VaeEncoder : public Vae {
 public:
  // image fp32 [batch, 3, height, width] in [-1, 1], both sizes multiples of factor()
  // -> latents fp32 [batch, latent_channels, height / factor, width / factor].
  virtual void encode(const float* image, float* latents, int batch, int height, int width,
                      std::byte* workspace, const Ops& ops) const = 0;
  // The same from pixels uint8 [batch, height, width, 3].
  virtual void encode_uint8(const std::uint8_t* pixels, float* latents, int batch, int height,
                            int width, std::byte* workspace, const Ops& ops) const = 0;
};

// Throws std::invalid_argument unless an image's sizes are multiples of the factor.
void check_image_size(const Vae& vae, int height, int width);

}  // namespace zimage_rt
