// Timings of a pipeline for benchmarks: milliseconds on the device, between two events.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/rng.h"
#include "device/arena.h"
#include "device/check.h"
#include "device/device.h"
#include "models/vae.h"
#include "runtime/graph_cache.h"
#include "runtime/pipeline_detail.h"

namespace zimage_rt {
namespace {

std::vector<float> noise(std::uint64_t seed, std::size_t count) {
  std::vector<float> values(count);
  randn(seed, values.data(), count);
  return values;
}

}  // namespace

std::vector<float> Pipeline::time(int repeats, const std::function<void()>& work) {
  work();
  stream_.synchronize();
  const GraphExec exec = capture_graph(stream_.get(), work);
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
    exec.launch(stream_.get());
    ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
    stream_.synchronize();
    if (i >= 2) times.push_back(decoded_.since(started_));
  }
  gemm_.save_cache();
  return times;
}

std::vector<float> Pipeline::time_evaluation(int latent_height, int latent_width,
                                             const std::vector<int>& context_tokens, int repeats) {
  const PipelineLock lock(mutex_, options_.device);
  const Transformer& transformer = need(transformer_, "transformer");
  const auto samples = static_cast<int>(context_tokens.size());
  const SampleShape shape{.latent_samples = samples,
                          .latent_height = latent_height,
                          .latent_width = latent_width,
                          .context_tokens = context_tokens};
  const std::size_t count = static_cast<std::size_t>(samples) * transformer.grid(shape).values();
  Arena size(nullptr);
  size.take<float>(count);
  transformer.plan_steps(1, size);
  transformer.plan(shape, size);
  Arena memory = arena(loop_memory_, size.used(), "one evaluation");
  float* const latents = memory.take<float>(count);
  const Transformer::StepTable table = transformer.plan_steps(1, memory);
  Transformer::Buffers at = transformer.plan(shape, memory);
  at.vectors = table.vectors, at.scales = table.scales;
  const std::size_t rows =
      std::accumulate(context_tokens.begin(), context_tokens.end(), std::size_t{0});
  const std::vector<float> x = noise(1, count), contexts = noise(2, rows * transformer.dim());
  const float timestep = 0.5f;
  upload_to(latents, x.data(), x.size(), stream_.get());
  upload_to(at.contexts, contexts.data(), contexts.size(), stream_.get());
  upload_to(table.timesteps, &timestep, 1, stream_.get());
  const Ops run = ops();
  transformer.prepare_steps(table, 1, run);
  transformer.prepare(shape, at, run);
  return time(repeats, [&] {
    transformer.evaluate({.shape = shape, .samples = samples, .buffers = at, .ops = run}, latents);
  });
}

std::vector<float> Pipeline::time_text_encoder(int tokens, int repeats) {
  const PipelineLock lock(mutex_, options_.device);
  TextEncoder& encoder = need(text_encoder_, "text_encoder");
  std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<std::int64_t>(i * 7919 % static_cast<std::size_t>(encoder.vocab_size()));
  Arena size(nullptr);
  encoder.plan(tokens, size);
  Arena memory = arena(side_memory_, size.used(), "encoding a prompt");
  const TextEncoder::Buffers at = encoder.plan(tokens, memory);
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    stream_.synchronize();
    ZRT_CUDA(cudaEventRecord(started_.get(), stream_.get()));
    run_text_encoder(ids.data(), tokens, at);
    ZRT_CUDA(cudaEventRecord(decoded_.get(), stream_.get()));
    stream_.synchronize();
    if (i >= 2) times.push_back(decoded_.since(started_));
  }
  gemm_.save_cache();
  return times;
}

std::vector<float> Pipeline::time_decode(const std::string& module, int latent_height,
                                         int latent_width, int repeats) {
  const PipelineLock lock(mutex_, options_.device);
  const VaeDecoder& decoder = need(vae_decoders_, module);
  const std::size_t size = static_cast<std::size_t>(latent_height) * latent_width;
  const std::size_t count = size * decoder.latent_channels(), out = 3 * size * area(decoder);
  const std::size_t work = decoder.workspace_bytes(latent_height, latent_width);
  Arena measure(nullptr);
  measure.take<float>(count), measure.take<std::uint8_t>(out), measure.take<int>(1);
  measure.take(work);
  Arena memory = arena(side_memory_, measure.used(), "decoding");
  float* const latents = memory.take<float>(count);
  auto* const pixels = memory.take<std::uint8_t>(out);
  int* const not_finite = memory.take<int>(1);
  std::byte* const workspace = memory.take(work);
  const std::vector<float> x = noise(1, count);
  upload_to(latents, x.data(), count, stream_.get());
  return time(repeats, [&] {
    decoder.decode_uint8(latents, pixels, not_finite, 1, latent_height, latent_width, workspace,
                         ops());
  });
}

std::vector<float> Pipeline::time_encode(const std::string& module, int latent_height,
                                         int latent_width, int repeats) {
  const PipelineLock lock(mutex_, options_.device);
  const VaeEncoder& encoder = need(vae_encoders_, module);
  const std::size_t size = static_cast<std::size_t>(latent_height) * latent_width;
  const std::size_t count = 3 * size * area(encoder), out = size * encoder.latent_channels();
  const std::size_t work = encoder.workspace_bytes(latent_height, latent_width);
  Arena measure(nullptr);
  measure.take<std::uint8_t>(count), measure.take<float>(out), measure.take(work);
  Arena memory = arena(side_memory_, measure.used(), "encoding an image");
  auto* const pixels = memory.take<std::uint8_t>(count);
  float* const latents = memory.take<float>(out);
  std::byte* const workspace = memory.take(work);
  std::vector<std::uint8_t> x(count);
  for (std::size_t i = 0; i < count; ++i) x[i] = static_cast<std::uint8_t>(i * 2654435761u >> 24);
  upload_to(pixels, x.data(), count, stream_.get());
  return time(repeats, [&] {
    encoder.encode_uint8(pixels, latents, 1, latent_height * encoder.factor(),
                         latent_width * encoder.factor(), workspace, ops());
  });
}

}  // namespace zimage_rt
