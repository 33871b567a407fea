// The layers of the full autoencoder: their weights, and the way of an image through them.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device/arena.h"
#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "device/tensor_view.h"
#include "kernels/conv2d.h"
#include "kernels/group_norm.h"
#include "kernels/softmax_rows.h"
#include "models/full_vae.h"
#include "ops/convolution.h"
#include "ops/linear.h"
#include "ops/linear_args.h"
#include "ops/ops.h"
#include "weights/weights.h"

namespace zimage_rt {
namespace {

constexpr float kEps = 1e-6f;                 // of all group norms (export/modeling/vae.py)
constexpr float kStreamScale16 = 1.0f / 128;  // see FullVaeLayers
// Scores and probabilities of so many bytes are in memory at once.
constexpr std::size_t kScoreBytes = std::size_t{208} << 20;
constexpr int kScoreRows = 128;  // their rows are a multiple of it: a tile of a product
constexpr float kLog2E = 1.4426950408889634f;
// Probabilities of many positions would fall below fp16's normal range: they are stored times
// this power of two.
constexpr float kProbabilityScale = 4096.0f;
// The first convolution's input has this many channels in memory.
constexpr int kInputChannels = 16;
constexpr int kMostChannels = 2048;  // of kernels/group_norm.h

void check(const FullVaeConfig& config) {
  if (config.widths.empty() || config.layers_per_block < 1)
    throw std::invalid_argument("full VAE: expected a stage and a layer per block, or more");
  for (const int width : config.widths)
    if (width < 8 || width % 8 != 0 || width > kMostChannels || config.norm_num_groups < 1 ||
        width % config.norm_num_groups != 0)
      throw std::invalid_argument(
          "full VAE: the cuda backend computes stages whose width is a multiple of 8, and of "
          "norm_num_groups, up to " +
          std::to_string(kMostChannels) + "; got " + std::to_string(width) + " and " +
          std::to_string(config.norm_num_groups) + " groups");
  if (config.latent_channels < 1 || config.latent_channels > kInputChannels ||
      config.image_channels != 3)
    throw std::invalid_argument(
        "full VAE: expected at most 16 latent channels and 3 image channels, got " +
        std::to_string(config.latent_channels) + " and " + std::to_string(config.image_channels));
  if (config.quant_conv)
    throw std::invalid_argument(
        "full VAE: the cuda backend has no quant_conv and post_quant_conv, which this VAE uses");
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

// Reads and packs the weights into an arena; over a null base it only checks and counts.
class FullVaeLayers::Builder {
 public:
  Builder(const Weights& weights, DType dtype, Arena& memory, cudaStream_t stream)
      : weights_(weights), dtype_(dtype), memory_(memory), stream_(stream) {}

  // `stored_out` are the outputs in the file, of which the first `out` are computed.
  Conv conv(const std::string& name, Conv2dKind kind, int in, int out, int stored_out = 0) {
    const DType stored = weights_.is_fp32() ? DType::kFloat32 : weights_.storage();
    const int size = kind == Conv2dKind::k1x1 ? 1 : 3, outs = std::max(out, stored_out);
    const TensorView weight = weights_.get(name + ".weight", {outs, in, size, size}, stored);
    const TensorView bias = weights_.get(name + ".bias", {outs}, stored);
    return pack({.kind = kind,
                 .in_channels = in,
                 .out_channels = out,
                 .weight = weight.data,
                 .weight_type = stored,
                 .out_stride = static_cast<std::int64_t>(in) * size * size,
                 .in_stride = size * size,
                 .bias = bias.data,
                 .bias_type = stored});
  }
  // A linear layer, stored as [in, out] with a bias in fp32, as a convolution.
  Conv linear(const std::string& name, int channels) {
    const DType stored = weights_.is_fp32() ? DType::kFloat32 : weights_.storage();
    const TensorView weight = weights_.get(name + ".weight", {channels, channels}, stored);
    return pack({.kind = Conv2dKind::k1x1,
                 .in_channels = channels,
                 .out_channels = channels,
                 .weight = weight.data,
                 .weight_type = stored,
                 .out_stride = 1,
                 .in_stride = channels,
                 .bias = weights_.vector(name + ".bias", channels),
                 .bias_type = DType::kFloat32});
  }
  Norm norm(const std::string& name, int channels) {
    return {.channels = channels,
            .weight = copy(weights_.vector(name + ".weight", channels), channels),
            .bias = copy(weights_.vector(name + ".bias", channels), channels)};
  }
  Block block(const std::string& name, int in, int out) {
    Block found{.norm1 = norm(name + ".norm1", in),
                .norm2 = norm(name + ".norm2", out),
                .conv1 = conv(name + ".conv1", Conv2dKind::k3x3, in, out),
                .conv2 = conv(name + ".conv2", Conv2dKind::k3x3, out, out),
                .shortcut = {}};
    if (in != out) found.shortcut = conv(name + ".conv_shortcut", Conv2dKind::k1x1, in, out);
    return found;
  }
  Attention attention(const std::string& name, int channels) {
    return {.norm = norm(name + ".group_norm", channels),
            .query = linear(name + ".to_q", channels),
            .key = linear(name + ".to_k", channels),
            .value = linear(name + ".to_v", channels),
            .out = linear(name + ".to_out.0", channels)};
  }

 private:
  Conv pack(const Conv2dWeights& weights) {
    std::byte* const packed =
        memory_.take(conv2d_packed_bytes(weights.kind, weights.in_channels, weights.out_channels));
    if (packed != nullptr) conv2d_pack(weights, dtype_, packed, stream_);
    return {.kind = weights.kind,
            .in = weights.in_channels,
            .out = weights.out_channels,
            .packed = packed};
  }
  const float* copy(const float* vector, int count) {
    float* const copied = memory_.take<float>(static_cast<std::size_t>(count));
    if (copied != nullptr)
      ZRT_CUDA(cudaMemcpyAsync(copied, vector, count * sizeof(float), cudaMemcpyDeviceToDevice,
                               stream_));
    return copied;
  }

  const Weights& weights_;
  DType dtype_;
  Arena& memory_;
  cudaStream_t stream_;
};

FullVaeLayers::FullVaeLayers(const FullVaeConfig& config, bool decoder, const Weights& weights)
    : decoder_(decoder),
      groups_(config.norm_num_groups),
      // Modules of fp16 bundles are stored in fp32, for backends that overflow.
      dtype_(weights.is_fp32() ? DType::kFloat16 : weights.storage()),
      stream_scale_(dtype_ == DType::kFloat16 ? kStreamScale16 : 1.0f) {
  check(config);
  const Stream stream;
  Arena size(nullptr);
  build(config, weights, size, stream.get());
  packed_ = DeviceBuffer(size.used(), "full VAE weights");
  Arena memory(packed_.data());
  build(config, weights, memory, stream.get());
  stream.synchronize();
}

void FullVaeLayers::build(const FullVaeConfig& config, const Weights& weights, Arena& memory,
                          cudaStream_t stream) {
  Builder read(weights, dtype_, memory, stream);
  std::vector<int> widths = config.widths;
  if (decoder_) std::reverse(widths.begin(), widths.end());
  const std::string prefix = decoder_ ? "decoder." : "encoder.";
  const std::string stages = prefix + (decoder_ ? "up_blocks." : "down_blocks.");
  const int blocks = config.layers_per_block + (decoder_ ? 1 : 0);
  const int middle = decoder_ ? widths.front() : widths.back();
  conv_in_ = read.conv(prefix + "conv_in", Conv2dKind::k3x3,
                       decoder_ ? config.latent_channels : config.image_channels, widths.front());
  stages_.clear();
  for (std::size_t i = 0; i < widths.size(); ++i) {
    const std::string name = stages + std::to_string(i);
    Stage stage;
    for (int block = 0; block < blocks; ++block)
      stage.blocks.push_back(read.block(name + ".resnets." + std::to_string(block),
                                        block == 0 && i > 0 ? widths[i - 1] : widths[i],
                                        widths[i]));
    if (i + 1 < widths.size())
      stage.sampler =
          read.conv(name + (decoder_ ? ".upsamplers.0.conv" : ".downsamplers.0.conv"),
                    decoder_ ? Conv2dKind::k3x3Up : Conv2dKind::k3x3Down, widths[i], widths[i]);
    stages_.push_back(std::move(stage));
  }
  middle_.clear();
  for (const char* name : {"mid_block.resnets.0", "mid_block.resnets.1"})
    middle_.push_back(read.block(prefix + name, middle, middle));
  if (config.attention) attention_ = read.attention(prefix + "mid_block.attentions.0", middle);
  norm_out_ = read.norm(prefix + "conv_norm_out", widths.back());
  // Of the encoder's mean and logarithm of the variance, only the mean.
  conv_out_ = read.conv(prefix + "conv_out", Conv2dKind::k3x3, widths.back(),
                        decoder_ ? config.image_channels : config.latent_channels,
                        decoder_ ? 0 : 2 * config.latent_channels);
}

// An image's way through the layers, in three buffers: the stream, and two for a block. Without
// `ops` it computes nothing, and measures the buffers.
class FullVaeLayers::Pass {
 public:
  Pass(const FullVaeLayers& layers, int height, int width, const Ops* ops)
      : layers_(layers), ops_(ops), height_(height), width_(width) {}

  // Takes buffers of the sizes that `measured` found.
  void allocate(const Pass& measured, Arena& memory) {
    for (int i = 0; i < kBuffers; ++i) buffers_[i] = memory.take(measured.bytes_[i]);
    sums_ = memory.take<ChannelSums>(measured.sums_count_);
    affine_ = memory.take<ChannelAffine>(measured.affine_count_);
  }

  void run(const Conv2d& last) {
    use(x_, kInputChannels * pixels() * 2);
    conv(layers_.conv_in_, x_, h_, {.in_channels = kInputChannels});
    std::swap(x_, h_);
    if (layers_.decoder_) middle();
    for (const Stage& stage : layers_.stages_) {
      for (const Block& found : stage.blocks) block(found);
      if (!stage.sampler) continue;
      conv(*stage.sampler, x_, h_, {.in_stream = true});
      std::swap(x_, h_);
    }
    if (!layers_.decoder_) middle();
    norm(layers_.norm_out_, x_, x_, true);
    if (ops_ == nullptr) return;
    Conv2d args = arguments(layers_.conv_out_, layers_.conv_out_.in);
    args.output_kind = last.output_kind;
    args.input = buffers_[x_];
    args.output = last.output;
    args.sum_scale = last.sum_scale, args.bias_scale = last.bias_scale, args.shift = last.shift;
    args.not_finite = last.not_finite;
    convolution(args, *ops_);
  }

 private:
  static constexpr int kBuffers = 3;

  struct Options {
    bool in_stream = false;  // the input has the stream's scale
    bool to_stream = true;   // the output has, and its sums are for a group norm
    int residual = -1;       // a buffer
    int in_channels = 0;     // in memory, if not the convolution's
    void* output = nullptr;  // in place of a buffer
    bool sums = true;
  };

  std::size_t pixels() const { return static_cast<std::size_t>(height_) * width_; }
  void use(int buffer, std::size_t bytes) { bytes_[buffer] = std::max(bytes_[buffer], bytes); }
  std::size_t value_bytes() const { return size_of(layers_.dtype_); }

  Conv2d arguments(const Conv& layer, int in_channels) const {
    Conv2d args;
    args.kind = layer.kind;
    args.dtype = layers_.dtype_;
    args.packed = layer.packed;
    args.height = height_, args.width = width_;
    args.in_channels = in_channels;
    args.out_channels = layer.out;
    return args;
  }

  // A convolution from buffer `from` to buffer `to`. Afterwards the sizes are its output's.
  void conv(const Conv& layer, int from, int to, const Options& options) {
    Conv2d args = arguments(layer, options.in_channels > 0 ? options.in_channels : layer.in);
    const auto out_pixels = static_cast<std::size_t>(args.out_height()) * args.out_width();
    if (options.output == nullptr) use(to, out_pixels * layer.out * value_bytes());
    const bool sums = options.to_stream && options.sums;
    if (sums)
      sums_count_ = std::max(sums_count_, static_cast<std::size_t>(conv2d_max_parts(args)) *
                                              static_cast<std::size_t>(layer.out));
    if (ops_ != nullptr) {
      const float scale = options.to_stream ? layers_.stream_scale_ : 1.0f;
      args.input = buffers_[from];
      args.output = options.output == nullptr ? buffers_[to] : options.output;
      args.residual = options.residual < 0 ? nullptr : buffers_[options.residual];
      args.sum_scale = options.in_stream ? 1.0f : scale;
      args.bias_scale = scale;
      args.sums = sums ? sums_ : nullptr;
      const int parts = convolution(args, *ops_);
      if (sums) parts_ = parts;
    }
    height_ = args.out_height(), width_ = args.out_width();
  }

  // The group norm of the latest convolution with sums, which is in buffer `from`.
  void norm(const Norm& layer, int from, int to, bool silu) {
    use(to, pixels() * layer.channels * value_bytes());
    affine_count_ = std::max(affine_count_, static_cast<std::size_t>(layer.channels));
    if (ops_ == nullptr) return;
    const auto count = static_cast<std::int64_t>(pixels());
    group_norm_statistics({.sums = sums_,
                           .parts = parts_,
                           .pixels = count,
                           .channels = layer.channels,
                           .groups = layers_.groups_,
                           .weight = layer.weight,
                           .bias = layer.bias,
                           .eps = kEps * layers_.stream_scale_ * layers_.stream_scale_,
                           .affine = affine_},
                          ops_->stream);
    group_norm_apply({.x = buffers_[from],
                      .out = buffers_[to],
                      .dtype = layers_.dtype_,
                      .pixels = count,
                      .channels = layer.channels,
                      .affine = affine_,
                      .silu = silu},
                     ops_->stream);
  }

  void block(const Block& layer) {
    if (layer.shortcut) {
      // The stream is read for the last time by the norm, which then needs no buffer.
      conv(*layer.shortcut, x_, h_, {.in_stream = true, .sums = false});
      norm(layer.norm1, x_, x_, true);
      conv(layer.conv1, x_, t_, {});
      norm(layer.norm2, t_, t_, true);
      conv(layer.conv2, t_, h_, {.residual = h_});
      std::swap(x_, h_);
      return;
    }
    norm(layer.norm1, x_, h_, true);
    conv(layer.conv1, h_, t_, {});
    norm(layer.norm2, t_, t_, true);
    conv(layer.conv2, t_, x_, {.residual = x_});
  }

  void middle() {
    block(layers_.middle_[0]);
    if (layers_.attention_) attention(*layers_.attention_);
    block(layers_.middle_[1]);
  }

  // Attention of one head over all pixels. Scores are in memory for some rows at a time.
  void attention(const Attention& layer) {
    const int channels = layer.norm.channels, count = height_ * width_;
    const int keys = round_up(count, 8);  // rows of 16 bytes
    const std::size_t row_bytes = keys * (sizeof(float) + value_bytes());
    const auto most = static_cast<int>(
        std::clamp<std::size_t>(kScoreBytes / row_bytes, kScoreRows, std::size_t{1} << 20));
    const int parts = (count + most - 1) / most;
    const int rows = round_up((count + parts - 1) / parts, kScoreRows);

    norm(layer.norm, x_, h_, false);
    Arena memory(ops_ == nullptr ? nullptr : buffers_[t_]);
    const std::size_t value_count = static_cast<std::size_t>(keys) * channels;
    const std::size_t score_count = static_cast<std::size_t>(rows) * keys;
    std::byte* const query = memory.take(value_count * value_bytes());
    std::byte* const key = memory.take(value_count * value_bytes());
    std::byte* const value = memory.take(value_count * value_bytes());
    float* const scores = memory.take<float>(score_count);
    std::byte* const probabilities = memory.take(score_count * value_bytes());
    use(t_, memory.used());
    if (ops_ != nullptr) {
      conv(layer.query, h_, t_, {.to_stream = false, .output = query});
      conv(layer.key, h_, t_, {.to_stream = false, .output = key});
      conv(layer.value, h_, t_, {.to_stream = false, .output = value});
      const std::size_t used = static_cast<std::size_t>(count) * channels * value_bytes();
      for (std::byte* const padded : {key, value})
        ZRT_CUDA(
            cudaMemsetAsync(padded + used, 0, value_count * value_bytes() - used, ops_->stream));
      const Matrix keys_matrix{.data = key,
                               .dtype = layers_.dtype_,
                               .layout = Layout::kOutIn,
                               .in = channels,
                               .out = keys};
      const Matrix values_matrix{.data = value,
                                 .dtype = layers_.dtype_,
                                 .layout = Layout::kInOut,
                                 .in = keys,
                                 .out = channels};
      for (int first = 0; first < count; first += rows) {
        const int part = std::min(rows, count - first);
        const std::size_t at = static_cast<std::size_t>(first) * channels * value_bytes();
        linear({.x = query + at,
                .weight = keys_matrix,
                .out = scores,
                .out_type = DType::kFloat32,
                .rows = part,
                .alpha = kLog2E / std::sqrt(static_cast<float>(channels))},
               *ops_);
        softmax_rows({.x = scores,
                      .out = probabilities,
                      .dtype = layers_.dtype_,
                      .rows = part,
                      .columns = count,
                      .stride = keys,
                      .scale = kProbabilityScale},
                     ops_->stream);
        linear({.x = probabilities,
                .weight = values_matrix,
                .out = buffers_[h_] + at,
                .out_type = layers_.dtype_,
                .rows = part,
                .alpha = 1.0f / kProbabilityScale},
               *ops_);
      }
    }
    conv(layer.out, h_, x_, {.residual = x_});
  }

  const FullVaeLayers& layers_;
  const Ops* ops_;
  int height_, width_;         // of the stream
  int x_ = 0, h_ = 1, t_ = 2;  // the buffers of the stream, and of a block
  std::byte* buffers_[kBuffers] = {};
  std::size_t bytes_[kBuffers] = {};  // that were used
  ChannelSums* sums_ = nullptr;       // of the latest convolution that feeds a norm
  ChannelAffine* affine_ = nullptr;
  std::size_t sums_count_ = 0, affine_count_ = 0;
  int parts_ = 0;  // of sums_
};

std::size_t FullVaeLayers::workspace_bytes(int height, int width) const {
  Pass measured(*this, height, width, nullptr);
  measured.run({});
  Arena size(nullptr);
  Pass(*this, height, width, nullptr).allocate(measured, size);
  return size.used();
}

void FullVaeLayers::run(int height, int width, std::byte* workspace, const Conv2d& last,
                        const Ops& ops) const {
  Pass measured(*this, height, width, nullptr);
  measured.run({});
  Arena memory(workspace);
  Pass pass(*this, height, width, &ops);
  pass.allocate(measured, memory);
  pass.run(last);
}

}  // namespace zimage_rt
