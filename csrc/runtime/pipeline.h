#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "cpu/guidance.h"
#include "cpu/sampler.h"
#include "device/arena.h"
#include "device/device.h"
#include "models/controlnet.h"
#include "models/text_encoder.h"
#include "models/tiny_vae.h"
#include "models/transformer.h"
#include "ops/cublaslt_gemm.h"
#include "ops/cudnn_attention.h"
#include "ops/ops.h"
#include "weights/weights.h"

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

// What a callback is told after a step of the schedule.
struct LoopStep {
  int index;  // from 0
  int count;
  float sigma;       // before the step
  float sigma_next;  // after it
  // Copies the latents after this step, [batch, channels, latent_height, latent_width], to host
  // memory. From any thread, until the callback returns.
  std::function<void(float* target)> read_latents;
};

// Returns false to stop the loop.
using LoopCallback = std::function<bool(const LoopStep&)>;

// One request for the loop. Host pointers; sample i of `latents` belongs to contexts[i], and to
// negatives[i] where guidance is on.
struct SampleJob {
  int latent_height;
  int latent_width;
  std::vector<const float*> contexts;  // [context_tokens[i], dim] each
  std::vector<int> context_tokens;
  std::vector<const float*> negatives;
  std::vector<int> negative_tokens;
  std::vector<SamplerStep> steps;  // a table of zimage_rt/sampling/samplers.py
  Guidance guidance;
  const float* mask = nullptr;  // of an inpainting (cpu/sampler.h), else null
  const float* image = nullptr;
  const float* noise = nullptr;
  const float* step_noise = nullptr;  // [count_draws(steps), *latents]; null where that is 0
  Control control;                    // without latents: the transformer alone
  float* latents;                     // [batch, channels, latent_height, latent_width], in and out
  std::uint8_t* pixels;               // [batch, height, width, 3] out; null: not decoded
  LoopCallback callback;              // may be empty
};

using ModuleConfig =
    std::variant<TextEncoderConfig, TransformerConfig, ControlNetConfig, TinyVaeConfig>;

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

  // Uploads a module's weights and makes its program, which checks them. After an error the
  // pipeline is what it was, and the module can be loaded again. A ControlNet needs a transformer
  // that is loaded. Throws WeightError, OutOfMemoryError, std::invalid_argument for a module that
  // no program runs, that is loaded already, or whose sizes no kernel computes.
  void load(const std::string& module, std::unique_ptr<Weights> weights,
            const ModuleConfig& config);

  // Changes a loaded module's weights where they lie, so that captured graphs stay as they are; see
  // Weights::change, also for a text encoder that is not kept. Throws std::invalid_argument for a
  // module that was not loaded.
  void patch(const std::string& module, const std::vector<WeightPatch>& patches, bool add = false);

  // The modules one by one, on host memory.
  void encode(const std::int64_t* input_ids, int tokens, float* prompt_embeds);
  void refine(const float* prompt_embeds, int tokens, float* context);
  // noise_pred for samples whose contexts lie behind one another, all at one timestep.
  void evaluate(const float* latents, int latent_height, int latent_width, float timestep,
                const float* contexts, const std::vector<int>& context_tokens,
                const Control& control, float* noise_pred);
  void decode(const float* latents, int batch, int latent_height, int latent_width, float* image);
  void decode_pixels(const float* latents, int batch, int latent_height, int latent_width,
                     std::uint8_t* pixels);
  void encode_image(const float* image, int batch, int height, int width, float* latents);
  // The same from a picture [batch, height, width, 3].
  void encode_pixels(const std::uint8_t* pixels, int batch, int height, int width, float* latents);

  // Text encoder and context refiner in one: context [padded_tokens(tokens), dim].
  void context(const std::int64_t* input_ids, int tokens, float* context);
  // The sampler loop, and the decoder if `pixels` is asked for. A callback is called when its step
  // is done, while the device already works on the next one: stopping costs that step, and asking
  // for nothing but progress costs nothing. False: the callback stopped it; the latents are then
  // those that it was called for.
  bool sample(const SampleJob& job, SampleTimes& times);

  // Milliseconds a run, each on the device between two events, on random inputs.
  std::vector<float> time_evaluation(int latent_height, int latent_width,
                                     const std::vector<int>& context_tokens, int repeats);
  std::vector<float> time_text_encoder(int tokens, int repeats);
  std::vector<float> time_decode(int latent_height, int latent_width, int repeats);

  MemoryUse memory();
  int dim() const;               // of a context's rows
  int vae_factor() const;        // pixels a latent, in each direction
  int control_channels() const;  // of a control image's latents
  int graph_count() const { return static_cast<int>(graphs_.size()); }

 private:
  struct SampleBuffers;
  struct StepTables;
  struct Graph;
  struct ModuleKind;
  enum class Piece { kStep, kGuidedStep, kDecode };  // of a request: what is captured by itself

  explicit Pipeline(const PipelineOptions& options);  // on the current device
  Ops ops() {
    return {.gemm = gemm_,
            .cudnn = cudnn_.get(),
            .stream = stream_.get(),
            .fused_workspace = fused_workspace_.data()};
  }
  static const std::map<std::string, ModuleKind>& module_kinds();
  void check_limit(std::size_t more, const std::string& purpose);
  Arena arena(DeviceBuffer& buffer, std::size_t bytes, const char* purpose);
  void with_text_encoder(const std::function<void()>& work);
  template <typename T, typename Run>
  void decode_to(const float* latents, int batch, int latent_height, int latent_width, T* target,
                 Run&& run);
  template <typename T, typename Run>
  void encode_from(const T* source, int batch, int height, int width, float* latents, Run&& run);
  void read_back(void* target, const void* source, std::size_t bytes, const Stream& stream);
  std::vector<float> time(int repeats, const std::function<void()>& work);

  SampleBuffers plan(const SampleShape& shape, const SampleJob& job, Arena& arena) const;
  StepTables plan_tables(const SampleShape& shape, const SampleJob& job, Arena& arena) const;
  void load_inputs(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                   const StepTables& tables);
  void prepare(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
               const StepTables& tables);
  void select_step(const SampleShape& shape, const SampleJob& job, std::size_t row,
                   const SampleBuffers& at, const StepTables& tables);
  void evaluate_step(const SampleShape& shape, const SampleJob& job, bool guided,
                     const SampleBuffers& at);
  bool run_steps(const SampleShape& shape, const SampleJob& job, const SampleBuffers& at,
                 const StepTables& tables);
  void run_piece(const SampleShape& shape, const SampleJob& job, Piece piece,
                 const std::function<void()>& work);
  void capture(std::vector<int> key, const std::function<void()>& work);
  void trim_graphs();

  template <typename Module>
  static Module& need(std::optional<Module>& module, const char* name) {
    if (!module) throw std::runtime_error(std::string(name) + " was not loaded");
    return *module;
  }

  std::recursive_mutex mutex_;
  PipelineOptions options_;
  DeviceBuffer fused_workspace_;
  Stream stream_;
  Stream side_stream_;  // of the VAE: a preview does not wait for the step that runs
  CublasLtGemm gemm_;
  std::unique_ptr<CudnnAttention> cudnn_;                    // null: not used
  std::map<std::string, std::unique_ptr<Weights>> weights_;  // of loaded modules
  std::optional<TextEncoder> text_encoder_;
  std::optional<ContextRefiner> context_refiner_;
  std::optional<Transformer> transformer_;
  std::optional<ControlNet> controlnet_;  // refers to the transformer
  std::optional<TinyVaeDecoder> vae_decoder_;
  std::optional<TinyVaeEncoder> vae_encoder_;
  int latent_channels_ = 0;
  DeviceBuffer loop_memory_;   // the sampler loop's; graphs hold its addresses
  DeviceBuffer table_memory_;  // the loop's that no graph knows
  DeviceBuffer side_memory_;   // everything else's: a preview must not touch a loop's
  PinnedBuffer staging_;
  Event started_, denoised_, decoded_;
  Event step_done_[2];       // steps alternate
  bool sampling_ = false;    // loop_memory_ is in use
  std::list<Graph> graphs_;  // the last used first
};

}  // namespace zimage_rt
