#include "models/full_vae.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/check.h"
#include "kernels/conv2d.h"
#include "kernels/nchw_to_nhwc16.h"
#include "models/vae.h"
#include "ops/ops.h"
#include "weights/weights.h"

namespace zimage_rt {

FullVaeDecoder::FullVaeDecoder(const FullVaeConfig& config, const Weights& weights)
    : config_(config), layers_(config, true, weights) {}

std::size_t FullVaeDecoder::workspace_bytes(int latent_height, int latent_width) const {
  return layers_.workspace_bytes(latent_height, latent_width);
}

void FullVaeDecoder::decode_uint8(const float* latents, std::uint8_t* pixels, int* not_finite,
                                  int batch, int latent_height, int latent_width,
                                  std::byte* workspace, const Ops& ops) const {
  ZRT_CUDA(cudaMemsetAsync(not_finite, 0, sizeof(int), ops.stream));
  Conv2d last;
  last.output_kind = Conv2dOutput::kUint8;
  last.output = pixels;
  last.not_finite = not_finite;
  decode_to(latents, last, batch, latent_height, latent_width, workspace, ops);
}

void FullVaeDecoder::decode(const float* latents, float* image, int batch, int latent_height,
                            int latent_width, std::byte* workspace, const Ops& ops) const {
  Conv2d last;
  last.output_kind = Conv2dOutput::kFloat;
  last.output = image;
  decode_to(latents, last, batch, latent_height, latent_width, workspace, ops);
}

void FullVaeDecoder::decode_to(const float* latents, const Conv2d& last, int batch,
                               int latent_height, int latent_width, std::byte* workspace,
                               const Ops& ops) const {
  const std::size_t area = static_cast<std::size_t>(latent_height) * latent_width;
  const std::size_t image_bytes = area * factor() * factor() * config_.image_channels *
                                  (last.output_kind == Conv2dOutput::kUint8 ? 1 : sizeof(float));
  for (int i = 0; i < batch; ++i) {
    scale_to_nhwc({.input = latents + i * area * config_.latent_channels,
                   .output = layers_.input(workspace),
                   .dtype = layers_.dtype(),
                   .channels = config_.latent_channels,
                   .height = latent_height,
                   .width = latent_width},
                  1.0f / config_.scaling_factor, config_.shift_factor, ops.stream);
    Conv2d image = last;
    image.output = static_cast<std::byte*>(last.output) + i * image_bytes;
    layers_.run(latent_height, latent_width, workspace, image, ops);
  }
}

FullVaeEncoder::FullVaeEncoder(const FullVaeConfig& config, const Weights& weights)
    : config_(config), layers_(config, false, weights) {}

std::size_t FullVaeEncoder::workspace_bytes(int latent_height, int latent_width) const {
  return layers_.workspace_bytes(latent_height * factor(), latent_width * factor());
}

template <typename Read>
void FullVaeEncoder::encode_with(Read&& read, float* latents, int batch, int height, int width,
                                 std::byte* workspace, const Ops& ops) const {
  check_image_size(*this, height, width);
  const std::size_t latent_count =
      static_cast<std::size_t>(config_.latent_channels) * (height / factor()) * (width / factor());
  for (int i = 0; i < batch; ++i) {
    read(i, layers_.input(workspace));
    Conv2d last;
    last.output_kind = Conv2dOutput::kFloat;
    last.output = latents + i * latent_count;
    // latents = (x - shift_factor) * scaling_factor
    last.sum_scale = last.bias_scale = config_.scaling_factor;
    last.shift = -config_.shift_factor * config_.scaling_factor;
    layers_.run(height, width, workspace, last, ops);
  }
}

void FullVaeEncoder::encode(const float* image, float* latents, int batch, int height, int width,
                            std::byte* workspace, const Ops& ops) const {
  const std::size_t values = static_cast<std::size_t>(config_.image_channels) * height * width;
  const auto read = [&](int i, std::byte* target) {
    scale_to_nhwc({.input = image + i * values,
                   .output = target,
                   .dtype = layers_.dtype(),
                   .channels = config_.image_channels,
                   .height = height,
                   .width = width},
                  1.0f, 0.0f, ops.stream);
  };
  encode_with(read, latents, batch, height, width, workspace, ops);
}

void FullVaeEncoder::encode_uint8(const std::uint8_t* pixels, float* latents, int batch, int height,
                                  int width, std::byte* workspace, const Ops& ops) const {
  const std::int64_t area = static_cast<std::int64_t>(height) * width;
  const auto read = [&](int i, std::byte* target) {
    uint8_to_signed_nhwc(pixels + i * area * config_.image_channels, target, layers_.dtype(),
                         config_.image_channels, area, ops.stream);
  };
  encode_with(read, latents, batch, height, width, workspace, ops);
}

}  // namespace zimage_rt
