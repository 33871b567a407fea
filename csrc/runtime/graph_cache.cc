#include "runtime/graph_cache.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>

#include "device/check.h"
#include "device/device.h"

namespace zimage_rt {
namespace {

// Bounds of the cache, and the most graphs that one request adds.
constexpr std::size_t kMaxGraphs = 96;
constexpr std::size_t kMaxGraphBytes = std::size_t{512} << 20;
constexpr std::size_t kGraphsOfRequest = 3;

std::size_t free_bytes() {
  std::size_t free = 0, total = 0;
  ZRT_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

}  // namespace

GraphExec capture_graph(cudaStream_t stream, const std::function<void()>& work) {
  ZRT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  ZRT_CUDA(cudaStreamEndCapture(stream, &graph));
  GraphExec exec;
  try {
    exec = GraphExec(graph);
  } catch (...) {
    cudaGraphDestroy(graph);
    throw;
  }
  ZRT_CUDA(cudaGraphDestroy(graph));
  return exec;
}

void GraphCache::run(Key key, cudaStream_t stream, const std::function<void()>& work) {
  const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                  [&](const Graph& graph) { return graph.key == key; });
  if (found != graphs_.end()) {
    graphs_.splice(graphs_.begin(), graphs_, found);
    graphs_.front().exec.launch(stream);
    return;
  }
  work();
  const std::size_t before = free_bytes();
  GraphExec exec = capture_graph(stream, work);
  const std::size_t after = free_bytes();
  graphs_.push_front({.key = std::move(key),
                      .exec = std::move(exec),
                      .bytes = before > after ? before - after : 0});
}

void GraphCache::trim() {
  std::size_t held = bytes();
  while (graphs_.size() > kMaxGraphs - kGraphsOfRequest ||
         (graphs_.size() > kGraphsOfRequest && held > kMaxGraphBytes)) {
    held -= graphs_.back().bytes;
    graphs_.pop_back();
  }
}

std::size_t GraphCache::bytes() const {
  std::size_t bytes = 0;
  for (const Graph& graph : graphs_) bytes += graph.bytes;
  return bytes;
}

}  // namespace zimage_rt
