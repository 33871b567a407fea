#include "models/tiny_vae.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device/check.h"
#include "kernels/nchw_to_nhwc16.h"
#include "models/vae.h"
#include "ops/ops.h"

namespace zimage_rt {
namespace {

using Layer = TinyVaeLayers::Layer;

constexpr int kWidth = kConvWideChannels;

void check(const TinyVaeConfig& config) {
  if (config.widths.empty() || config.widths.size() != config.blocks.size())
    throw std::invalid_argument("tiny VAE: expected as many widths as numbers of blocks, got " +
                                std::to_string(config.widths.size()) + " and " +
                                std::to_string(config.blocks.size()));
  for (const int width : config.widths)
    if (width != kWidth)
      throw std::invalid_argument(
          "tiny VAE: the cuda backend computes stages 64 channels wide, got " +
          std::to_string(width));
  if (config.latent_channels < 1 || config.latent_channels > 16 || config.image_channels < 1 ||
      config.image_channels > 8)
    throw std::invalid_argument("tiny VAE: expected at most 16 latent and 8 image channels, got " +
                                std::to_string(config.latent_channels) + " and " +
                                std::to_string(config.image_channels));
}

// Layers under `prefix`, numbered as torch's nn.Sequential does.
class Builder {
 public:
  explicit Builder(std::string prefix) : prefix_(std::move(prefix)) {}

  Layer& conv(int in_channels, int out_channels, bool bias) {
    Layer layer;
    layer.in_channels = in_channels, layer.out_channels = out_channels;
    layer.names = {next()};
    layer.bias = {bias};
    layers_.push_back(layer);
    return layers_.back();
  }
  void block() {
    Layer layer;
    layer.kind = Layer::Kind::kBlock;
    const std::string name = next();
    for (const char* part : {".conv.0", ".conv.2", ".conv.4"}) layer.names.push_back(name + part);
    layer.bias = {true, true, true};
    layers_.push_back(layer);
  }
  // A ReLU or an upsampling has a number, but no weights.
  void skip_number() { ++number_; }
  std::vector<Layer> take() { return std::move(layers_); }

 private:
  std::string next() { return prefix_ + std::to_string(number_++); }
  std::string prefix_;
  int number_ = 0;
  std::vector<Layer> layers_;
};

std::vector<Layer> decoder_layers(const TinyVaeConfig& config) {
  check(config);
  Builder build("decoder.layers.");
  build.conv(config.latent_channels, kWidth, true).relu = true;
  build.skip_number();
  for (std::size_t stage = 0; stage < config.blocks.size(); ++stage) {
    for (int i = 0; i < config.blocks[stage]; ++i) build.block();
    if (stage + 1 == config.blocks.size()) {
      build.conv(kWidth, config.image_channels, true);
    } else {
      build.skip_number();
      build.conv(kWidth, kWidth, false).upsample = true;
    }
  }
  return build.take();
}

std::vector<Layer> encoder_layers(const TinyVaeConfig& config) {
  check(config);
  Builder build("encoder.layers.");
  for (std::size_t stage = 0; stage < config.blocks.size(); ++stage) {
    if (stage == 0)
      build.conv(config.image_channels, kWidth, true);
    else
      build.conv(kWidth, kWidth, false).stride = 2;
    for (int i = 0; i < config.blocks[stage]; ++i) build.block();
  }
  build.conv(kWidth, config.latent_channels, true);
  return build.take();
}

// Bytes of the largest activation of one image, `factor` times as large as the latents.
std::size_t buffer_bytes(int latent_height, int latent_width, int factor) {
  return static_cast<std::size_t>(latent_height) * factor * latent_width * factor * kWidth * 2;
}

constexpr std::size_t kBuffers = 3;

}  // namespace

TinyVaeLayers::TinyVaeLayers(std::vector<Layer> layers, const Weights& weights)
    : layers_(std::move(layers)), storage_(weights.storage()) {
  std::size_t bytes = 0;
  for (Layer& layer : layers_) {
    for (std::size_t i = 0; i < layer.names.size(); ++i) {
      layer.packed.push_back(bytes);
      bytes += conv3x3_packed_bytes(layer.in_channels, layer.out_channels);
    }
  }
  packed_ = DeviceBuffer(bytes, "tiny VAE weights");
  const Stream stream;
  for (const Layer& layer : layers_) {
    for (std::size_t i = 0; i < layer.names.size(); ++i) {
      const std::string& name = layer.names[i];
      const TensorView weight =
          weights.get(name + ".weight", {layer.out_channels, layer.in_channels, 3, 3}, storage_);
      TensorView bias;
      if (layer.bias[i]) bias = weights.get(name + ".bias", {layer.out_channels}, storage_);
      conv3x3_pack(weight.data, bias.data, storage_, layer.in_channels, layer.out_channels,
                   packed_.data() + layer.packed[i], stream.get());
    }
  }
  // With early_start, conv3x3 reads the weights before it waits for other kernels.
  stream.synchronize();
}

void TinyVaeLayers::run(std::byte* buffers, std::size_t buffer_bytes, int height, int width,
                        const Conv3x3& last, cudaStream_t stream) const {
  // The buffers by role: x is the input of the current layer, a and b are free.
  std::byte* a = buffers;
  std::byte* x = buffers + buffer_bytes;
  std::byte* b = buffers + 2 * buffer_bytes;
  const auto conv = [&](const Layer& layer, std::size_t i, const void* from, void* to, bool relu,
                        const void* residual) {
    Conv3x3 args = &layer == &layers_.back() ? last : Conv3x3{};
    args.input = from;
    args.packed = packed_.data() + layer.packed[i];
    args.residual = residual;
    if (&layer != &layers_.back()) args.output = to;
    args.dtype = storage_;
    args.height = height, args.width = width;
    args.in_channels = layer.in_channels, args.out_channels = layer.out_channels;
    args.relu = relu, args.upsample = layer.upsample, args.stride = layer.stride;
    args.early_start = true;
    conv3x3(args, stream);
    height = args.out_height(), width = args.out_width();
  };
  for (const Layer& layer : layers_) {
    if (layer.kind == Layer::Kind::kBlock) {
      conv(layer, 0, x, a, true, nullptr);
      conv(layer, 1, a, b, true, nullptr);
      conv(layer, 2, b, x, true, x);  // one thread reads and writes each element of x
    } else {
      conv(layer, 0, x, a, layer.relu, nullptr);
      std::swap(x, a);
    }
  }
}

TinyVaeDecoder::TinyVaeDecoder(const TinyVaeConfig& config, const Weights& weights)
    : config_(config), layers_(decoder_layers(config), weights) {}

std::size_t TinyVaeDecoder::workspace_bytes(int latent_height, int latent_width) const {
  return kBuffers * buffer_bytes(latent_height, latent_width, factor());
}

void TinyVaeDecoder::decode_uint8(const float* latents, std::uint8_t* pixels, int* not_finite,
                                  int batch, int latent_height, int latent_width,
                                  std::byte* workspace, const Ops& ops) const {
  ZRT_CUDA(cudaMemsetAsync(not_finite, 0, sizeof(int), ops.stream));
  Conv3x3 last;
  last.output = pixels;
  last.kind = Conv3x3Output::kUint8;
  last.not_finite = not_finite;
  decode_to(latents, last, batch, latent_height, latent_width, workspace, ops.stream);
}

void TinyVaeDecoder::decode(const float* latents, float* image, int batch, int latent_height,
                            int latent_width, std::byte* workspace, const Ops& ops) const {
  Conv3x3 last;
  last.output = image;
  last.kind = Conv3x3Output::kFloat;
  last.scale = 2.0f, last.shift = -1.0f;  // the layers output [0, 1]
  decode_to(latents, last, batch, latent_height, latent_width, workspace, ops.stream);
}

void TinyVaeDecoder::decode_to(const float* latents, const Conv3x3& last, int batch,
                               int latent_height, int latent_width, std::byte* workspace,
                               cudaStream_t stream) const {
  const std::size_t bytes = buffer_bytes(latent_height, latent_width, factor());
  const std::size_t latent_count =
      static_cast<std::size_t>(config_.latent_channels) * latent_height * latent_width;
  const std::size_t image_bytes = static_cast<std::size_t>(config_.image_channels) * latent_height *
                                  factor() * latent_width * factor() *
                                  (last.kind == Conv3x3Output::kUint8 ? 1 : sizeof(float));
  for (int i = 0; i < batch; ++i) {
    NchwToNhwc16 input;
    input.input = latents + i * latent_count;
    input.output = workspace + bytes;
    input.dtype = layers_.storage();
    input.channels = config_.latent_channels;
    input.height = latent_height, input.width = latent_width;
    unscale_latents_to_nhwc(input, config_.scaling_factor, config_.shift_factor, stream);
    Conv3x3 image = last;
    image.output = static_cast<std::byte*>(last.output) + i * image_bytes;
    layers_.run(workspace, bytes, latent_height, latent_width, image, stream);
  }
}

TinyVaeEncoder::TinyVaeEncoder(const TinyVaeConfig& config, const Weights& weights)
    : config_(config), layers_(encoder_layers(config), weights) {}

std::size_t TinyVaeEncoder::workspace_bytes(int latent_height, int latent_width) const {
  return kBuffers * buffer_bytes(latent_height, latent_width, factor());
}

template <typename Read>
void TinyVaeEncoder::encode_with(Read&& read, float* latents, int batch, int height, int width,
                                 std::byte* workspace, cudaStream_t stream) const {
  check_image_size(*this, height, width);
  const int latent_height = height / factor(), latent_width = width / factor();
  const std::size_t bytes = buffer_bytes(latent_height, latent_width, factor());
  const std::size_t latent_count =
      static_cast<std::size_t>(config_.latent_channels) * latent_height * latent_width;
  for (int i = 0; i < batch; ++i) {
    read(i, workspace + bytes);
    Conv3x3 last;
    last.output = latents + i * latent_count;
    last.kind = Conv3x3Output::kFloat;
    // latents = (x - shift_factor) * scaling_factor
    last.scale = config_.scaling_factor;
    last.shift = -config_.shift_factor * config_.scaling_factor;
    layers_.run(workspace, bytes, height, width, last, stream);
  }
}

void TinyVaeEncoder::encode(const float* image, float* latents, int batch, int height, int width,
                            std::byte* workspace, const Ops& ops) const {
  const auto read = [&](int i, std::byte* target) {
    NchwToNhwc16 input;
    input.input = image + static_cast<std::int64_t>(i) * config_.image_channels * height * width;
    input.output = target;
    input.dtype = layers_.storage();
    input.channels = config_.image_channels;
    input.height = height, input.width = width;
    image_to_nhwc(input, ops.stream);
  };
  encode_with(read, latents, batch, height, width, workspace, ops.stream);
}

void TinyVaeEncoder::encode_uint8(const std::uint8_t* pixels, float* latents, int batch, int height,
                                  int width, std::byte* workspace, const Ops& ops) const {
  const std::int64_t area = static_cast<std::int64_t>(height) * width;
  const auto read = [&](int i, std::byte* target) {
    uint8_to_nhwc(pixels + i * area * config_.image_channels, target, layers_.storage(),
                  config_.image_channels, area, ops.stream);
  };
  encode_with(read, latents, batch, height, width, workspace, ops.stream);
}

}  // namespace zimage_rt
