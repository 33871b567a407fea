#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <list>
#include <vector>

#include "device/device.h"

namespace zimage_rt {

// Captures `work` on a stream as a graph; nothing of it runs.
GraphExec capture_graph(cudaStream_t stream, const std::function<void()>& work);

// Captured graphs by key, bounded in number and device memory; the least recently used are evicted.
class GraphCache {
 public:
  // Everything that decides which kernels run and on which addresses.
  using Key = std::vector<int>;

  // Replays the graph of `key`. Without one, runs `work` on the stream, which may time matrix
  // products and build plans, then captures it for the next time while the device works.
  void run(Key key, cudaStream_t stream, const std::function<void()>& work);
  // Evicts graphs so that those of one more request fit. Call it while no graph is running.
  void trim();
  void clear() { graphs_.clear(); }
  int count() const { return static_cast<int>(graphs_.size()); }
  std::size_t bytes() const;

 private:
  struct Graph {
    Key key;
    GraphExec exec;
    std::size_t bytes;
  };
  std::list<Graph> graphs_;  // the most recently used first
};

}  // namespace zimage_rt
