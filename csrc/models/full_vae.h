#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "device/arena.h"
#include "device/device.h"
#include "device/dtype.h"
#include "kernels/conv2d.h"
#include "models/vae.h"
#include "ops/ops.h"
#include "weights/weights.h"

namespace zimage_rt {

// The config of AutoencoderKL's decoder or encoder in the manifest (export/modeling/vae.py).
struct FullVaeConfig {
  std::vector<int> widths;  // block_out_channels: of each stage of the encoder
  int layers_per_block = 2;
  int norm_num_groups = 32;
  int latent_channels = 16;
  int image_channels = 3;   // out_channels of a decoder, in_channels of an encoder
  bool attention = true;    // mid_block_add_attention
  bool quant_conv = false;  // use_post_quant_conv of a decoder, use_quant_conv of an encoder
  // From the transformer's latents to this model's: x = latents / scaling_factor + shift_factor.
  float scaling_factor = 1.0f;
  float shift_factor = 0.0f;
};

// The layers of a decoder or an encoder. The constructor packs their weights, after which those of
// the file are not needed on the device.
//
// fp16: activations of the real weights exceed 65504 between group norms. Everything that a group
// norm reads, which is the residual stream and the output of each block's first convolution, is
// therefore stored times 2^-7. A group norm's output does not depend on the scale of its input, if
// eps is multiplied by its square. Convolutions apply the factor to their fp32 sums, and those of
// the stream itself (shortcuts, samplers) only to their bias. A power of two changes exponents
// alone, so every value is rounded as without it, unless it falls below fp16's normal range: values
// of less than 2^-7 in the stream's own unit have an error of at most 2^-18, that of fp16 at 2^-7.
class FullVaeLayers {
 public:
  // Throws WeightError naming a tensor, std::invalid_argument for sizes that no kernel computes.
  FullVaeLayers(const FullVaeConfig& config, bool decoder, const Weights& weights);

  DType dtype() const { return dtype_; }
  std::size_t weight_bytes() const { return packed_.bytes(); }
  // Of an input of `height` x `width`.
  std::size_t workspace_bytes(int height, int width) const;
  // Where run() expects its input: NHWC with 16 channels.
  std::byte* input(std::byte* workspace) const { return workspace; }
  // Runs all layers on one image. `last` has the output and its kind, and the scales and the shift
  // of the last convolution.
  void run(int height, int width, std::byte* workspace, const Conv2d& last, const Ops& ops) const;

 private:
  struct Conv {
    Conv2dKind kind = Conv2dKind::k3x3;
    int in = 0, out = 0;
    const std::byte* packed = nullptr;
  };
  struct Norm {
    int channels = 0;
    const float *weight = nullptr, *bias = nullptr;
  };
  struct Block {
    Norm norm1, norm2;
    Conv conv1, conv2;
    std::optional<Conv> shortcut;
  };
  struct Attention {
    Norm norm;
    Conv query, key, value, out;
  };
  struct Stage {
    std::vector<Block> blocks;
    std::optional<Conv> sampler;
  };
  class Builder;
  class Pass;

  void build(const FullVaeConfig& config, const Weights& weights, Arena& memory,
             cudaStream_t stream);

  bool decoder_;
  int groups_;
  DType dtype_;         // of activations
  float stream_scale_;  // of what group norms read
  DeviceBuffer packed_;
  Conv conv_in_, conv_out_;
  std::vector<Stage> stages_;
  std::vector<Block> middle_;  // two
  std::optional<Attention> attention_;
  Norm norm_out_;
};

class FullVaeDecoder final : public VaeDecoder {
 public:
  FullVaeDecoder(const FullVaeConfig& config, const Weights& weights);

  int factor() const override { return 1 << (config_.widths.size() - 1); }
  int latent_channels() const override { return config_.latent_channels; }
  std::size_t workspace_bytes(int latent_height, int latent_width) const override;
  std::size_t weight_bytes() const override { return layers_.weight_bytes(); }
  bool uses_products() const override { return true; }
  void decode_uint8(const float* latents, std::uint8_t* pixels, int* not_finite, int batch,
                    int latent_height, int latent_width, std::byte* workspace,
                    const Ops& ops) const override;
  void decode(const float* latents, float* image, int batch, int latent_height, int latent_width,
              std::byte* workspace, const Ops& ops) const override;

 private:
  void decode_to(const float* latents, const Conv2d& last, int batch, int latent_height,
                 int latent_width, std::byte* workspace, const Ops& ops) const;
  FullVaeConfig config_;
  FullVaeLayers layers_;
};

// The latents are the mean of the posterior.
class FullVaeEncoder final : public VaeEncoder {
 public:
  FullVaeEncoder(const FullVaeConfig& config, const Weights& weights);

  int factor() const override { return 1 << (config_.widths.size() - 1); }
  int latent_channels() const override { return config_.latent_channels; }
  std::size_t workspace_bytes(int latent_height, int latent_width) const override;
  std::size_t weight_bytes() const override { return layers_.weight_bytes(); }
  bool uses_products() const override { return true; }
  void encode(const float* image, float* latents, int batch, int height, int width,
              std::byte* workspace, const Ops& ops) const override;
  void encode_uint8(const std::uint8_t* pixels, float* latents, int batch, int height, int width,
                    std::byte* workspace, const Ops& ops) const override;

 private:
  // `read` writes the i-th image as the input of the first convolution.
  template <typename Read>
  void encode_with(Read&& read, float* latents, int batch, int height, int width,
                   std::byte* workspace, const Ops& ops) const;
  FullVaeConfig config_;
  FullVaeLayers layers_;
};

}  // namespace zimage_rt
