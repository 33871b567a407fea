#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device/device.h"
#include "device/dtype.h"
#include "kernels/conv3x3.h"
#include "models/vae.h"
#include "ops/ops.h"
#include "weights/weights.h"

namespace zimage_rt {

// The config of TAEF1's decoder or encoder in the manifest (export/modeling/vae.py).
struct TinyVaeConfig {
  std::vector<int> widths;  // of each stage; the kernels compute 64 only
  std::vector<int> blocks;  // of each stage
  int latent_channels = 16;
  int image_channels = 3;  // out_channels of a decoder, in_channels of an encoder
  // From the transformer's latents to this model's: x = latents / scaling_factor + shift_factor.
  float scaling_factor = 1.0f;
  float shift_factor = 0.0f;
};

// The layers of a decoder or an encoder in order, with their weights packed for conv3x3 in one
// buffer.
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

  // Runs all layers on one image of `height` x `width` in buffer 1, NHWC with 16 channels; buffers
  // 0 to 2 are `buffer_bytes` apart. `last` has the output, kind, scale and shift of the last
  // layer.
  void run(std::byte* buffers, std::size_t buffer_bytes, int height, int width, const Conv3x3& last,
           cudaStream_t stream) const;
  DType storage() const { return storage_; }
  std::size_t weight_bytes() const { return packed_.bytes(); }

 private:
  std::vector<Layer> layers_;
  DType storage_;
  DeviceBuffer packed_;
};

class TinyVaeDecoder final : public VaeDecoder {
 public:
  // Reads uploaded weights ("decoder.layers...") and keeps a packed copy. Throws WeightError for
  // tensors, std::invalid_argument for sizes that no kernel computes.
  TinyVaeDecoder(const TinyVaeConfig& config, const Weights& weights);

  int factor() const override { return 1 << (config_.widths.size() - 1); }
  int latent_channels() const override { return config_.latent_channels; }
  std::size_t workspace_bytes(int latent_height, int latent_width) const override;
  std::size_t weight_bytes() const override { return layers_.weight_bytes(); }
  bool uses_products() const override { return false; }
  void decode_uint8(const float* latents, std::uint8_t* pixels, int* not_finite, int batch,
                    int latent_height, int latent_width, std::byte* workspace,
                    const Ops& ops) const override;
  void decode(const float* latents, float* image, int batch, int latent_height, int latent_width,
              std::byte* workspace, const Ops& ops) const override;

 private:
  void decode_to(const float* latents, const Conv3x3& last, int batch, int latent_height,
                 int latent_width, std::byte* workspace, cudaStream_t stream) const;
  TinyVaeConfig config_;
  TinyVaeLayers layers_;
};

class TinyVaeEncoder final : public VaeEncoder {
 public:
  // See TinyVaeDecoder; "encoder.layers...".
  TinyVaeEncoder(const TinyVaeConfig& config, const Weights& weights);

  int factor() const override { return 1 << (config_.widths.size() - 1); }
  int latent_channels() const override { return config_.latent_channels; }
  std::size_t workspace_bytes(int latent_height, int latent_width) const override;
  std::size_t weight_bytes() const override { return layers_.weight_bytes(); }
  bool uses_products() const override { return false; }
  void encode(const float* image, float* latents, int batch, int height, int width,
              std::byte* workspace, const Ops& ops) const override;
  void encode_uint8(const std::uint8_t* pixels, float* latents, int batch, int height, int width,
                    std::byte* workspace, const Ops& ops) const override;

 private:
  // `read` writes the i-th image as the input of the first convolution.
  template <typename Read>
  void encode_with(Read&& read, float* latents, int batch, int height, int width,
                   std::byte* workspace, cudaStream_t stream) const;
  TinyVaeConfig config_;
  TinyVaeLayers layers_;
};

}  // namespace zimage_rt
