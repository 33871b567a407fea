#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "cpu/sampler.h"
#include "device/arena.h"
#include "device/device.h"
#include "models/controlnet.h"
#include "models/full_vae.h"
#include "models/text_encoder.h"
#include "models/tiny_vae.h"
#include "models/transformer.h"
#include "models/vae.h"
#include "ops/cublaslt_gemm.h"
#include "ops/cudnn_attention.h"
#include "ops/ops.h"
#include "runtime/graph_cache.h"
#include "weights/weights.h"

namespace zimage_rt {

// The device and the libraries of a pipeline. Libraries are paths or names for the loader.
struct PipelineOptions {
  int device = 0;
  std::string cublaslt;
  std::string cudnn;              // empty: our own attention alone
  std::string cache_file;         // of timed algorithms; empty: none
  std::size_t memory_limit = 0;   // bytes of device memory, see check_limit(); 0: no limit
  bool keep_text_encoder = true;  // false: its weights are loaded in groups for every prompt
  bool fused_gemm = true;         // false: cuBLASLt alone, even if kernels/fused_gemm.h runs here
};

// The input of a ControlNet; host memory.
struct Control {
  const float* latents;  // [batch, control_in_dim, latent_height, latent_width]
  float scale;           // the factor of the hints
};

// An encoded prompt, fp32 [tokens, dim]; host memory.
struct Context {
  const float* data;
  int tokens;  // a multiple of kSequenceMultiple
};

// The inputs of the transformer other than latents and timestep. Entry i belongs to sample i.
struct Conditioning {
  std::vector<Context> contexts;
  std::vector<Context> negatives;  // read at guided evaluations; empty without guidance
  std::optional<Control> control;
};

using ModuleConfig = std::variant<TextEncoderConfig, TransformerConfig, ControlNetConfig,
                                  TinyVaeConfig, FullVaeConfig>;

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

// The transformer's layers that are not resident.
struct Streaming {
  int layers;
  std::size_t host_bytes;  // their page-locked memory
};

// The modules of one bundle on one device and one stream. Every call takes the pipeline's lock, so
// threads run one at a time; none of them holds Python's lock.
class Pipeline {
 public:
  static std::unique_ptr<Pipeline> make(const PipelineOptions& options);
  ~Pipeline();

  // Uploads a module's weights and constructs its model, which checks them. After an error the
  // pipeline is unchanged, and the module can be loaded again. A ControlNet needs a loaded
  // transformer. Throws WeightError, OutOfMemoryError, or std::invalid_argument for a module that
  // is unknown or loaded already, or whose sizes no kernel computes.
  void load(const std::string& module, std::unique_ptr<Weights> weights,
            const ModuleConfig& config);

  // Patches the weights of a loaded module in place, so that captured graphs stay valid; see
  // Weights::patch. Throws std::invalid_argument for a module that was not loaded.
  void patch(const std::string& module, const std::vector<WeightPatch>& patches, bool add = false);

  // Single modules, on host memory.
  void encode(const std::int64_t* input_ids, int tokens, float* prompt_embeds);
  void refine(const float* prompt_embeds, int tokens, float* context);
  // noise_pred of samples at one timestep; `contexts` holds their contexts one after the other.
  void evaluate(const float* latents, int latent_height, int latent_width, float timestep,
                const float* contexts, const std::vector<int>& context_tokens,
                const std::optional<Control>& control, float* noise_pred);
  // `module` is a VAE's decoder, such as "tiny_vae_decoder".
  void decode(const std::string& module, const float* latents, int batch, int latent_height,
              int latent_width, float* image);
  void decode_pixels(const std::string& module, const float* latents, int batch, int latent_height,
                     int latent_width, std::uint8_t* pixels);
  // `module` is a VAE's encoder.
  void encode_image(const std::string& module, const float* image, int batch, int height, int width,
                    float* latents);
  // The same from pixels [batch, height, width, 3].
  void encode_pixels(const std::string& module, const std::uint8_t* pixels, int batch, int height,
                     int width, float* latents);

  // Text encoder and context refiner in one: context [padded_tokens(tokens), dim].
  void context(const std::int64_t* input_ids, int tokens, float* context);
  // The sampler loop and, unless `pixels` [batch, height, width, 3] is null, `decoder`. The
  // callback of a step runs while the device computes the next step: stopping costs that step, and
  // a callback that reads no latents costs nothing. Returns false if the callback stopped the loop;
  // the latents are then those of its step.
  bool sample(const SampleJob& job, const Conditioning& conditioning, const std::string& decoder,
              std::uint8_t* pixels, SampleTimes& times);

  // Milliseconds per run, on the device between two events, on random inputs.
  std::vector<float> time_evaluation(int latent_height, int latent_width,
                                     const std::vector<int>& context_tokens, int repeats);
  std::vector<float> time_text_encoder(int tokens, int repeats);
  std::vector<float> time_decode(const std::string& module, int latent_height, int latent_width,
                                 int repeats);
  std::vector<float> time_encode(const std::string& module, int latent_height, int latent_width,
                                 int repeats);

  MemoryUse memory();
  Streaming streaming();
  int dim() const;  // of a context
  const Vae& vae(const std::string& module) const;
  int control_channels() const;  // of the latents of a control image
  int graph_count() const { return graphs_.count(); }

 private:
  struct Request;
  struct SampleBuffers;
  struct StepTables;
  struct ModuleKind;
  enum class GraphKind { kStep, kGuidedStep, kDecode };

  explicit Pipeline(const PipelineOptions& options);  // on the current device
  Ops ops() { return ops(stream_); }
  Ops ops(const Stream& stream) {
    return {.gemm = gemm_,
            .cudnn = cudnn_.get(),
            .stream = stream.get(),
            .fused_workspace = fused_workspace_.data(),
            .split_workspace = split_workspace_.data()};
  }
  // The stream of a VAE outside of the loop.
  const Stream& stream_of(const Vae& vae) const {
    return vae.uses_products() ? stream_ : side_stream_;
  }
  static const std::map<std::string, ModuleKind>& module_kinds();
  static int module_index(const std::string& module);  // among all kinds of modules
  std::size_t used();
  void check_limit(std::size_t more, const std::string& purpose);
  void make_room();
  std::size_t stream_layers(std::size_t missing);
  Arena arena(DeviceBuffer& buffer, std::size_t bytes, const char* purpose);
  void with_text_encoder(const std::function<void()>& work);
  void run_text_encoder(const std::int64_t* input_ids, int tokens, const TextEncoder::Buffers& at);
  template <typename T, typename Run>
  void decode_to(const std::string& module, const float* latents, int batch, int latent_height,
                 int latent_width, T* target, Run&& run);
  template <typename T, typename Run>
  void encode_from(const std::string& module, const T* source, int batch, int height, int width,
                   float* latents, Run&& run);
  void read_back(void* target, const void* source, std::size_t bytes, const Stream& stream);
  std::vector<float> time(int repeats, const std::function<void()>& work);

  SampleBuffers plan(const Request& request, Arena& arena) const;
  StepTables plan_tables(const Request& request, Arena& arena) const;
  void load_inputs(const Request& request, const SampleBuffers& at, const StepTables& tables);
  void prepare(const Request& request, const SampleBuffers& at, const StepTables& tables);
  void select_step(const Request& request, std::size_t row, const SampleBuffers& at,
                   const StepTables& tables);
  void evaluate_step(const Request& request, bool guided, const SampleBuffers& at);
  void launch_step(const Request& request, std::size_t& row, int index, const SampleBuffers& at,
                   const StepTables& tables);
  void launch_decode(const Request& request, const SampleBuffers& at);
  bool run_steps(const Request& request, const SampleBuffers& at, const StepTables& tables);
  void run_graph(const Request& request, GraphKind kind, const std::function<void()>& work);
  void read_result(const Request& request, const SampleBuffers& at);

  template <typename Module>
  static Module& need(std::optional<Module>& module, const char* name) {
    if (!module) throw std::runtime_error(std::string(name) + " was not loaded");
    return *module;
  }
  template <typename Module>
  static const Module& need(const std::map<std::string, std::unique_ptr<Module>>& modules,
                            const std::string& name) {
    const auto found = modules.find(name);
    if (found == modules.end()) throw std::runtime_error(name + " was not loaded");
    return *found->second;
  }

  std::recursive_mutex mutex_;
  PipelineOptions options_;
  DeviceBuffer fused_workspace_;
  DeviceBuffer split_workspace_;  // for 8-bit matrices without fused products
  Stream stream_;
  Stream side_stream_;  // of the tiny VAE: a preview does not wait for the current step
  CublasLtGemm gemm_;
  std::unique_ptr<CudnnAttention> cudnn_;                    // null: not used
  std::map<std::string, std::unique_ptr<Weights>> weights_;  // of loaded modules
  std::optional<TextEncoder> text_encoder_;
  std::optional<ContextRefiner> context_refiner_;
  std::optional<Transformer> transformer_;
  std::optional<ControlNet> controlnet_;                             // refers to the transformer
  std::map<std::string, std::unique_ptr<VaeDecoder>> vae_decoders_;  // by module
  std::map<std::string, std::unique_ptr<VaeEncoder>> vae_encoders_;
  DeviceBuffer loop_memory_;   // of the sampler loop; graphs hold its addresses
  DeviceBuffer table_memory_;  // of the sampler loop, not used by graphs
  // Of everything else, such as a preview during a loop; prompt_graphs_ hold its addresses.
  DeviceBuffer side_memory_;
  PinnedBuffer staging_;
  Event started_, denoised_, decoded_;
  Event step_done_[2];     // steps alternate
  bool sampling_ = false;  // loop_memory_ is in use
  GraphCache graphs_;
  GraphCache prompt_graphs_;  // of the text encoder
};

}  // namespace zimage_rt
