#include "ops/cublaslt_gemm.h"

#include <cublasLt.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/library.h"
#include "device/matrix.h"

namespace zimage_rt {
namespace {

constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // NVIDIA's advice for Hopper
constexpr int kCandidates = 16;
// All candidates are timed once, and the fastest of them again.
constexpr std::size_t kFinalists = 5;
constexpr std::size_t kRepeats = 5;
constexpr int kBurst = 10;
// Products of nearly the same m share an algorithm: a new prompt length must not need a new timing.
constexpr int kRowBucket = 256;
constexpr int kSmallRows = 512;
// Written between timed runs, so that weights are read from memory as in a forward pass.
constexpr std::size_t kFlush = std::size_t{128} << 20;

cudaDataType_t cuda_type(DType type) {
  return type == DType::kFloat32 ? CUDA_R_32F : type == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
}

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw CudaError(std::string(call) + " failed with status " + std::to_string(status));
}

// The functions used, found by name.
struct Api {
  explicit Api(const std::string& path) : library(path) {}
  Library library;
#define ZRT_FUNCTION(name) decltype(::name)* name = library.function<decltype(::name)>(#name)
  ZRT_FUNCTION(cublasLtCreate);
  ZRT_FUNCTION(cublasLtDestroy);
  ZRT_FUNCTION(cublasLtGetVersion);
  ZRT_FUNCTION(cublasLtMatmul);
  ZRT_FUNCTION(cublasLtMatmulAlgoGetHeuristic);
  ZRT_FUNCTION(cublasLtMatmulAlgoCheck);
  ZRT_FUNCTION(cublasLtMatmulDescCreate);
  ZRT_FUNCTION(cublasLtMatmulDescDestroy);
  ZRT_FUNCTION(cublasLtMatmulDescSetAttribute);
  ZRT_FUNCTION(cublasLtMatmulPreferenceCreate);
  ZRT_FUNCTION(cublasLtMatmulPreferenceDestroy);
  ZRT_FUNCTION(cublasLtMatmulPreferenceSetAttribute);
  ZRT_FUNCTION(cublasLtMatrixLayoutCreate);
  ZRT_FUNCTION(cublasLtMatrixLayoutDestroy);
#undef ZRT_FUNCTION
};

// Everything that the algorithm of a product depends on.
using Key = std::array<int, 7>;  // type, out_type, bias, m, n, k, whether [out, in]

Key key_of(const LinearArgs& args) {
  return {
      {static_cast<int>(args.weight.dtype), static_cast<int>(args.out_type), args.bias != nullptr,
       args.rows <= kSmallRows ? args.rows : (args.rows + kRowBucket - 1) / kRowBucket * kRowBucket,
       args.weight.out, args.weight.in, args.weight.layout == Layout::kOutIn}};
}

// cuBLASLt's descriptors of one product. The library is column-major, where a row-major matrix is
// its transpose, so it computes outᵀ [n, m] = weightᵀ [n, k] · xᵀ [k, m]. Only a weight stored as
// [out, in] needs the transpose flag.
class Problem {
 public:
  Problem(const Api& api, const LinearArgs& args) : api_(api) {
    check(api.cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
    if (args.bias != nullptr) {
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    }
    const Matrix& matrix = args.weight;
    const bool out_in = matrix.layout == Layout::kOutIn;
    if (out_in) set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    weight = out_in ? descriptor(matrix.dtype, matrix.in, matrix.out)
                    : descriptor(matrix.dtype, matrix.out, matrix.in);
    x = descriptor(matrix.dtype, matrix.in, args.rows);
    out = descriptor(args.out_type, matrix.out, args.rows);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() {
    for (const cublasLtMatrixLayout_t matrix : {weight, x, out})
      if (matrix != nullptr) api_.cublasLtMatrixLayoutDestroy(matrix);
    if (operation != nullptr) api_.cublasLtMatmulDescDestroy(operation);
  }

  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, x = nullptr, out = nullptr;

 private:
  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(api_.cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value),
          "cublasLtMatmulDescSetAttribute");
  }
  cublasLtMatrixLayout_t descriptor(DType type, int rows, int columns) {
    cublasLtMatrixLayout_t matrix = nullptr;
    check(api_.cublasLtMatrixLayoutCreate(&matrix, cuda_type(type), static_cast<unsigned>(rows),
                                          static_cast<unsigned>(columns), rows),
          "cublasLtMatrixLayoutCreate");
    return matrix;
  }
  const Api& api_;
};

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  ZRT_CUDA(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

struct CublasLtGemm::State {
  State(const std::string& library, std::string file)
      : api(library), cache_file(std::move(file)), workspace(kWorkspace, "cuBLASLt's workspace") {
    check(api.cublasLtCreate(&handle), "cublasLtCreate");
    int device = 0;
    cudaDeviceProp properties{};
    ZRT_CUDA(cudaGetDevice(&device));
    ZRT_CUDA(cudaGetDeviceProperties(&properties, device));
    std::string name = properties.name;
    std::replace(name.begin(), name.end(), ' ', '_');
    machine = name + "/" + std::to_string(properties.multiProcessorCount) + "/cublasLt-" +
              std::to_string(api.cublasLtGetVersion());
    read_cache();
  }
  ~State() { api.cublasLtDestroy(handle); }

  void multiply(const Problem& problem, const LinearArgs& args,
                const cublasLtMatmulAlgo_t& algorithm, cudaStream_t stream) const {
    const float beta = 0.0f;
    check(
        api.cublasLtMatmul(handle, problem.operation, &args.alpha, args.weight.data, problem.weight,
                           args.x, problem.x, &beta, args.out, problem.out, args.out, problem.out,
                           &algorithm, workspace.data(), workspace.bytes(), stream),
        "cublasLtMatmul");
  }

  std::vector<cublasLtMatmulAlgo_t> candidates(const Problem& problem) const {
    cublasLtMatmulPreference_t preference = nullptr;
    check(api.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const std::size_t limit = workspace.bytes();
    cublasLtMatmulHeuristicResult_t results[kCandidates];
    int count = 0;
    cublasStatus_t status = api.cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit, sizeof limit);
    if (status == CUBLAS_STATUS_SUCCESS)
      status = api.cublasLtMatmulAlgoGetHeuristic(handle, problem.operation, problem.weight,
                                                  problem.x, problem.out, problem.out, preference,
                                                  kCandidates, results, &count);
    api.cublasLtMatmulPreferenceDestroy(preference);
    check(status, "cublasLtMatmulAlgoGetHeuristic");
    std::vector<cublasLtMatmulAlgo_t> usable;
    for (int i = 0; i < count; ++i)
      if (results[i].state == CUBLAS_STATUS_SUCCESS) usable.push_back(results[i].algo);
    if (usable.empty()) throw CudaError("cuBLASLt has no algorithm for a matrix product");
    return usable;
  }

  // Times every candidate on the real operands; the output is the same after each.
  cublasLtMatmulAlgo_t fastest(const Problem& problem, const LinearArgs& args,
                               cudaStream_t stream) {
    const bool small = args.rows <= kSmallRows;
    DeviceBuffer flush;
    if (small) flush = DeviceBuffer(kFlush, "timing matrix products");
    Event start, stop;
    const auto time = [&](const cublasLtMatmulAlgo_t& algorithm, int calls) {
      if (flush.data() != nullptr)
        ZRT_CUDA(cudaMemsetAsync(flush.data(), 0, flush.bytes(), stream));
      ZRT_CUDA(cudaEventRecord(start.get(), stream));
      for (int i = 0; i < calls; ++i) multiply(problem, args, algorithm, stream);
      ZRT_CUDA(cudaEventRecord(stop.get(), stream));
      ZRT_CUDA(cudaEventSynchronize(stop.get()));
      return stop.since(start);
    };
    std::vector<std::pair<float, cublasLtMatmulAlgo_t>> timed;
    for (const cublasLtMatmulAlgo_t& algorithm : candidates(problem)) {
      time(algorithm, 1);  // loads the kernel
      timed.emplace_back(time(algorithm, 1), algorithm);
    }
    const auto faster = [](const auto& a, const auto& b) { return a.first < b.first; };
    std::sort(timed.begin(), timed.end(), faster);
    timed.resize(std::min(timed.size(), kFinalists));
    // The finalists alternate. Large products run in bursts: many of them in a row take the chip
    // to its power limit, where another algorithm may be the fastest than in a single call.
    std::vector<std::array<float, kRepeats>> times(timed.size());
    for (std::size_t round = 0; round < kRepeats; ++round)
      for (std::size_t i = 0; i < timed.size(); ++i)
        times[i][round] = time(timed[i].second, small ? 1 : kBurst);
    for (std::size_t i = 0; i < timed.size(); ++i) {
      std::sort(times[i].begin(), times[i].end());
      timed[i].first = times[i][kRepeats / 2];
    }
    return std::min_element(timed.begin(), timed.end(), faster)->second;
  }

  // Lines of: machine, the key's numbers, the algorithm's words in hexadecimal.
  void read_cache() {
    std::ifstream file(cache_file);
    std::string line;
    while (std::getline(file, line)) {
      std::istringstream words(line);
      std::string from;
      Key key;
      cublasLtMatmulAlgo_t algorithm;
      words >> from;
      for (int& number : key) words >> number;
      for (std::uint64_t& word : algorithm.data) words >> std::hex >> word;
      if (words && from == machine)
        algorithms[key] = algorithm;
      else if (words)
        others.push_back(line);
    }
  }

  Api api;
  std::string cache_file;
  DeviceBuffer workspace;
  cublasLtHandle_t handle = nullptr;
  std::string machine;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;
  std::map<Key, bool> checked;  // algorithms from the file that this library accepts
  std::vector<std::string> others;
  bool changed = false;
};

CublasLtGemm::CublasLtGemm(const std::string& library, std::string cache_file)
    : state_(std::make_unique<State>(library, std::move(cache_file))) {}

CublasLtGemm::~CublasLtGemm() = default;

std::size_t CublasLtGemm::workspace_bytes() const { return state_->workspace.bytes(); }

void CublasLtGemm::run(const LinearArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  State& state = *state_;
  const Problem problem(state.api, args);
  const Key key = key_of(args);
  auto found = state.algorithms.find(key);
  if (found != state.algorithms.end() && !state.checked[key]) {
    cublasLtMatmulHeuristicResult_t result{};
    const cublasStatus_t status = state.api.cublasLtMatmulAlgoCheck(
        state.handle, problem.operation, problem.weight, problem.x, problem.out, problem.out,
        &found->second, &result);
    if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > state.workspace.bytes()) {
      state.algorithms.erase(found);
      found = state.algorithms.end();
    }
  }
  if (found == state.algorithms.end()) {
    if (capturing(stream)) throw CudaError("a matrix product was captured before it was timed");
    found = state.algorithms.emplace(key, state.fastest(problem, args, stream)).first;
    state.changed = true;
  }
  state.checked[key] = true;
  state.multiply(problem, args, found->second, stream);
}

void CublasLtGemm::save_cache() {
  State& state = *state_;
  if (!state.changed || state.cache_file.empty()) return;
  const std::string draft = state.cache_file + "." + std::to_string(getpid());
  {
    std::ofstream file(draft);
    for (const std::string& line : state.others) file << line << '\n';
    for (const auto& [key, algorithm] : state.algorithms) {
      file << state.machine << std::dec;
      for (const int number : key) file << ' ' << number;
      file << std::hex;
      for (const std::uint64_t word : algorithm.data) file << ' ' << word;
      file << '\n';
    }
    if (!file.flush()) {
      std::remove(draft.c_str());
      return;
    }
  }
  if (std::rename(draft.c_str(), state.cache_file.c_str()) != 0) std::remove(draft.c_str());
  state.changed = false;
}

}  // namespace zimage_rt
