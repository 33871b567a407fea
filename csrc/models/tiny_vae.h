#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/device.h"
#include "kernels/conv3x3.h"
#include "weights/weights.h"

namespace zimage_rt {

// Sizes of TAEF1's decoder or encoder as the manifest has them (export/modeling/vae.py).
struct TinyVaeConfig {
  std::vector<int> widths;  // of each stage; 64 is what the kernels compute
  std::vector<int> blocks;  // of each stage
  int latent_channels = 16;
  int image_channels = 3;  // out_channels of a decoder, in_channels of an encoder
  // Of the transformer's latents: own = latents / scaling_factor + shift_factor.
  float scaling_factor = 1.0f;
  float shift_factor = 0.0f;
};

// A decoder made NaN or infinity of its latents; what it says is the module.
struct NotFiniteError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The layers of either half in order, their weights packed for conv3x3 in one buffer.
class TinyVaeLayers {
 public:
  struct Layer {
    enum class Kind { kConv, kBlock };  // a block is three convolutions with a skip
    Kind kind = Kind::kConv;
    int in_channels = 64, out_channels = 64;
    bool relu = false, upsample = false;
    int stride = 1;
    std::vector<std::string> names;  // of its convolutions, e.g. "decoder.layers.2.conv.0"
    std::vector<bool> bias;
    std::vector<std::size_t> packed;  // offsets in the buffer
  };

  // Checks and packs. Throws WeightError naming the tensor.
  TinyVaeLayers(std::vector<Layer> layers, const Weights& weights);

  // Runs all layers on one picture of `height` x `width` that lies in buffer 1 as pixels of 16
  // channels; buffers 0 to 2 are `buffer_bytes` apart. `last` says what becomes of the last layer's
  // result: output, kind, scale, shift.
  void run(std::byte* buffers, std::size_t buffer_bytes, int height, int width, const Conv3x3& last,
           cudaStream_t stream) const;
  DType storage() const { return storage_; }

 private:
  std::vector<Layer> layers_;
  DType storage_;
  DeviceBuffer packed_;
};

// Latents to a picture. Pictures of a batch are made one after another, in the memory of one.
class TinyVaeDecoder {
 public:
  // Reads `weights` (uploaded, "decoder.layers...") and keeps its own copy. Throws WeightError for
  // tensors, std::invalid_argument for sizes that the kernels do not compute.
  TinyVaeDecoder(const TinyVaeConfig& config, const Weights& weights);

  // Pixels per latent, in each direction.
  int factor() const { return 1 << (config_.widths.size() - 1); }
  std::size_t workspace_bytes(int batch, int latent_height, int latent_width) const;

  // latents fp32 [batch, latent_channels, latent_height, latent_width]
  // -> pixels [batch, height, width, 3], and in `not_finite` [1] whether a value was NaN or
  // infinite. `workspace` is 16-byte aligned.
  void decode_uint8(const float* latents, std::uint8_t* pixels, int* not_finite, int batch,
                    int latent_height, int latent_width, std::byte* workspace,
                    cudaStream_t stream) const;
  // -> image fp32 [batch, 3, height, width] in about [-1, 1].
  void decode(const float* latents, float* image, int batch, int latent_height, int latent_width,
              std::byte* workspace, cudaStream_t stream) const;

 private:
  void decode_to(const float* latents, const Conv3x3& last, int batch, int latent_height,
                 int latent_width, std::byte* workspace, cudaStream_t stream) const;
  TinyVaeConfig config_;
  TinyVaeLayers layers_;
};

// A picture to latents.
class TinyVaeEncoder {
 public:
  // As TinyVaeDecoder, "encoder.layers...".
  TinyVaeEncoder(const TinyVaeConfig& config, const Weights& weights);

  int factor() const { return 1 << (config_.widths.size() - 1); }
  std::size_t workspace_bytes(int batch, int latent_height, int latent_width) const;

  // image fp32 [batch, 3, height, width] in [-1, 1], both sizes multiples of factor()
  // -> latents fp32 [batch, latent_channels, height / factor, width / factor].
  void encode(const float* image, float* latents, int batch, int height, int width,
              std::byte* workspace, cudaStream_t stream) const;
  // The same from pixels uint8 [batch, height, width, 3].
  void encode_uint8(const std::uint8_t* pixels, float* latents, int batch, int height, int width,
                    std::byte* workspace, cudaStream_t stream) const;

 private:
  // `read` makes the i-th picture the first convolution's input.
  template <typename Read>
  void encode_with(Read&& read, float* latents, int batch, int height, int width,
                   std::byte* workspace, cudaStream_t stream) const;
  TinyVaeConfig config_;
  TinyVaeLayers layers_;
};

}  // namespace zimage_rt
