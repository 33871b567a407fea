#include "ops/cudnn_attention.h"

// The frontend looks cuDNN's functions up in this handle, so that nothing links to the library.
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/library.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}

namespace zimage_rt {
namespace {

namespace fe = cudnn_frontend;

enum : std::int64_t { kQ = 1, kK, kV, kOut };

void check(fe::error_t status, const char* doing) {
  if (status.is_bad())
    throw CudaError(std::string("cuDNN: ") + doing + ": " + status.get_message());
}

}  // namespace

class CudnnAttention::State {
 public:
  explicit State(const std::string& path) : library_(path) {
    fe::cudnn_dlhandle = library_.handle();
    if (fe::detail::create_handle(&handle_) != CUDNN_STATUS_SUCCESS)
      throw CudaError("cudnnCreate failed");
  }
  ~State() { fe::detail::destroy_handle(handle_); }

  void run(const AttentionArgs& args, cudaStream_t stream) {
    const Key key{{static_cast<std::int64_t>(args.type), args.batch, args.tokens, args.heads,
                   args.kv_heads, args.head_dim, args.token_stride, args.batch_stride,
                   args.out_token_stride, args.out_batch_stride, args.causal}};
    auto found = plans_.find(key);
    if (found == plans_.end()) found = plans_.emplace(key, build(args)).first;
    if (fe::detail::set_stream(handle_, stream) != CUDNN_STATUS_SUCCESS)
      throw CudaError("cudnnSetStream failed");
    std::unordered_map<std::int64_t, void*> tensors = {{kQ, const_cast<void*>(args.q)},
                                                       {kK, const_cast<void*>(args.k)},
                                                       {kV, const_cast<void*>(args.v)},
                                                       {kOut, args.out}};
    check(found->second.graph->execute(handle_, tensors, found->second.workspace.data()),
          "attention");
  }

 private:
  using Key = std::array<std::int64_t, 11>;
  struct Plan {
    std::shared_ptr<fe::graph::Graph> graph;
    DeviceBuffer workspace;
  };

  Plan build(const AttentionArgs& args) {
    auto graph = std::make_shared<fe::graph::Graph>();
    graph
        ->set_io_data_type(args.type == DType::kFloat16 ? fe::DataType_t::HALF
                                                        : fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const auto input = [&](const char* name, std::int64_t uid, int heads) {
      return graph->tensor(
          fe::graph::Tensor_attributes()
              .set_name(name)
              .set_uid(uid)
              .set_dim({args.batch, heads, args.tokens, args.head_dim})
              .set_stride({args.batch_stride, args.head_dim, args.token_stride, 1}));
    };
    auto options = fe::graph::SDPA_attributes()
                       .set_name("attention")
                       .set_generate_stats(false)
                       .set_attn_scale(1.0f / std::sqrt(static_cast<float>(args.head_dim)));
    if (args.causal) options.set_causal_mask(true);
    auto [out, stats] = graph->sdpa(input("q", kQ, args.heads), input("k", kK, args.kv_heads),
                                    input("v", kV, args.kv_heads), options);
    out->set_output(true)
        .set_uid(kOut)
        .set_dim({args.batch, args.heads, args.tokens, args.head_dim})
        .set_stride({args.out_batch_stride, args.head_dim, args.out_token_stride, 1});
    check(graph->build(handle_, {fe::HeurMode_t::A}), "attention has no plan");
    const std::int64_t bytes = graph->get_workspace_size();
    return {.graph = std::move(graph),
            .workspace = DeviceBuffer(static_cast<std::size_t>(bytes), "cuDNN's workspace")};
  }

  Library library_;
  cudnnHandle_t handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

CudnnAttention::CudnnAttention(const std::string& library)
    : state_(std::make_unique<State>(library)) {}

CudnnAttention::~CudnnAttention() = default;

std::unique_ptr<CudnnAttention> CudnnAttention::open(const std::string& library) {
  int device = 0, major = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  ZRT_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (library.empty() || major < 9) return nullptr;
  return std::unique_ptr<CudnnAttention>(new CudnnAttention(library));
}

void CudnnAttention::run(const AttentionArgs& args, cudaStream_t stream) {
  state_->run(args, stream);
}

}  // namespace zimage_rt
