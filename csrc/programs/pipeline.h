#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "programs/controlnet.h"
#include "programs/text_encoder.h"
#include "programs/tiny_vae.h"
#include "programs/transformer.h"
#include "zimage_rt/guidance.h"
#include "zimage_rt/sampler.h"

namespace zimage_rt {

// Where a pipeline runs. Libraries are paths or names for the loader; an empty `cudnn` means our
// own attention alone, an empty `cache_file` that timed algorithms are forgotten.
struct PipelineOptions {
  int device = 0;
  std::string cublaslt;
  std::string cudnn;
  std::string cache_file;
  std::size_t memory_limit = 0;   // bytes of device memory; 0: all there is
  bool keep_text_encoder = true;  // false: its weights come a few layers at a time, every prompt
  bool fused_gemm = true;         // false: cuBLASLt alone, also where kernels/fused_gemm.h runs
};

// What a ControlNet follows; host memory.
struct Control {
  const float* latents = nullptr;  // [batch, control_in_dim, latent_height, latent_width]
  float scale = 0.0f;
};

// One request for the loop. Host pointers; sample i of `latents` belongs to contexts[i], and to
// negatives[i] where guidance is on.
struct SampleJob {
  int latent_height;
  int latent_width;
  std::vector<const float*> contexts;  // [context_rows[i], dim] each
  std::vector<int> context_rows;
  std::vector<const float*> negatives;
  std::vector<int> negative_rows;
  std::vector<SamplerStep> steps;  // a table of zimage_rt/samplers.py
  Guidance guidance;
  const float* mask = nullptr;  // of an inpainting (zimage_rt/sampler.h), else null
  const float* image = nullptr;
  const float* noise = nullptr;
  Control control;        // without latents: the transformer alone
  float* latents;         // [batch, channels, latent_height, latent_width], in and out
  std::uint8_t* pixels;   // [batch, height, width, 3] out; null: not decoded
  StepCallback callback;  // empty: the whole loop is one graph
};

// Seconds on the device.
struct SampleTimes {
  double denoise = 0.0;
  double decode = 0.0;
};

struct MemoryUse {
  std::size_t weights;
  std::size_t workspace;  // arenas and libraries
  std::size_t graphs;
  std::size_t free;
  std::size_t total;
};

// The programs of one bundle on one device, on one stream. Every call takes the lock, so that
// threads take turns; none of them holds Python's.
class Pipeline {
 public:
  static std::unique_ptr<Pipeline> make(const PipelineOptions& options);
  ~Pipeline();

  // Uploads a module's weights. Throws WeightError, OutOfMemoryError.
  void load_text_encoder(std::unique_ptr<Weights> weights, const TextEncoderConfig& config);
  void load_context_refiner(std::unique_ptr<Weights> weights, const TransformerConfig& config);
  void load_transformer(std::unique_ptr<Weights> weights, const TransformerConfig& config);
  // Beside a transformer that is loaded.
  void load_controlnet(std::unique_ptr<Weights> weights, const ControlNetConfig& config);
  void load_vae_decoder(std::unique_ptr<Weights> weights, const TinyVaeConfig& config);
  void load_vae_encoder(std::unique_ptr<Weights> weights, const TinyVaeConfig& config);

  // Changes a loaded module's weights where they lie, so that captured graphs stay as they are; see
  // Weights::change, also for a text encoder that is not kept. Throws std::invalid_argument for a
  // module that was not loaded.
  void change(const std::string& module, const std::vector<LowRank>& changes, bool add = false);

  // The modules one by one, on host memory.
  void encode(const std::int64_t* input_ids, int tokens, float* prompt_embeds);
  void refine(const float* prompt_embeds, int tokens, float* context);
  // noise_pred for samples whose contexts lie behind one another, all at one timestep.
  void evaluate(const float* latents, int latent_height, int latent_width, float timestep,
                const float* contexts, const std::vector<int>& context_rows, const Control& control,
                float* noise_pred);
  void decode(const float* latents, int batch, int latent_height, int latent_width, float* image);
  void decode_pixels(const float* latents, int batch, int latent_height, int latent_width,
                     std::uint8_t* pixels);
  void encode_image(const float* image, int batch, int height, int width, float* latents);
  // The same from a picture [batch, height, width, 3].
  void encode_pixels(const std::uint8_t* pixels, int batch, int height, int width, float* latents);

  // Text encoder and context refiner in one: context [padded_rows(tokens), dim].
  void context(const std::int64_t* input_ids, int tokens, float* context);
  // The sampler loop, and the decoder if `pixels` is asked for. False: the callback stopped it.
  bool sample(const SampleJob& job, SampleTimes& times);

  // Milliseconds a run, each on the device between two events, on random inputs.
  std::vector<float> time_evaluation(int latent_height, int latent_width,
                                     const std::vector<int>& context_rows, int repeats);
  std::vector<float> time_text_encoder(int tokens, int repeats);
  std::vector<float> time_decode(int latent_height, int latent_width, int repeats);

  MemoryUse memory();
  int dim() const;               // of a context's rows
  int vae_factor() const;        // pixels a latent, in each direction
  int control_channels() const;  // of a control image's latents
  int graph_count() const { return static_cast<int>(graphs_.size()); }

 private:
  struct SampleBuffers;
  struct Graph;

  explicit Pipeline(const PipelineOptions& options);  // on the current device
  Ops ops() { return {gemm_, attention_, stream_.get(), fused_workspace_.data()}; }
  std::unique_ptr<Weights> upload(std::unique_ptr<Weights> weights, const std::string& purpose);
  void check_limit(std::size_t more, const std::string& purpose);
  Arena arena(DeviceBuffer& buffer, std::size_t bytes, const char* purpose);
  void with_text_encoder(const std::function<void()>& work);
  template <typename T, typename Run>
  void decode_to(const float* latents, int batch, int latent_height, int latent_width, T* target,
                 Run&& run);
  template <typename T, typename Run>
  void encode_from(const T* source, int batch, int height, int width, float* latents, Run&& run);
  void read_back(void* target, const void* source, std::size_t bytes);
  std::vector<float> time(int repeats, const std::function<void()>& work);

  SampleBuffers plan(const SampleShape& shape, const SampleJob& job, Arena& arena) const;
  void load_inputs(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at);
  void prepare(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at);
  void step(const SampleShape& shape, const SampleJob& job, int i, const SampleBuffers& at);
  void decode_samples(const SampleShape& shape, const SampleBuffers& at);
  void run_all(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
               unsigned event_flags);
  bool run_steps(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at);
  void capture(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
               std::vector<int> key);

  template <typename Module>
  static Module& need(std::optional<Module>& module, const char* name) {
    if (!module) throw std::runtime_error(std::string(name) + " was not loaded");
    return *module;
  }

  std::recursive_mutex mutex_;
  PipelineOptions options_;
  DeviceBuffer fused_workspace_;
  Stream stream_;
  Gemm gemm_;
  Attention attention_;
  std::vector<std::unique_ptr<Weights>> weights_;
  Weights* text_weights_ = nullptr;
  std::map<std::string, Weights*> changeable_;
  std::optional<TextEncoder> text_encoder_;
  std::optional<ContextRefiner> context_refiner_;
  std::optional<Transformer> transformer_;
  std::optional<ControlNet> controlnet_;  // refers to the transformer
  std::optional<TinyVaeDecoder> vae_decoder_;
  std::optional<TinyVaeEncoder> vae_encoder_;
  int latent_channels_ = 0;
  DeviceBuffer loop_memory_;  // the sampler loop's; graphs hold its addresses
  DeviceBuffer side_memory_;  // everything else's: a preview must not touch a loop's
  PinnedBuffer staging_;
  Event started_, denoised_, decoded_;
  std::list<Graph> graphs_;  // the last used first
};

}  // namespace zimage_rt
