#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "device/device.h"

namespace zimage_rt {

// The matrices of a model's blocks, which run in order once per evaluation. Some blocks are
// resident; the others are in page-locked host memory, in the device's layout, and are copied to a
// small ring of slots on a stream of their own while the blocks before them are computed.
class StreamedBlocks {
 public:
  // Two slots: one block is computed while the next one is copied.
  static constexpr int kSlots = 2;

  // `bytes`: of each block. All blocks are resident until plan() or move() says otherwise.
  explicit StreamedBlocks(std::vector<std::size_t> bytes);
  StreamedBlocks(const StreamedBlocks&) = delete;
  StreamedBlocks& operator=(const StreamedBlocks&) = delete;
  ~StreamedBlocks();

  int count() const { return static_cast<int>(blocks_.size()); }
  int streamed() const { return static_cast<int>(order_.size()); }
  bool is_streamed(int block) const { return at(block).slot >= 0; }
  std::size_t bytes(int block) const { return at(block).bytes; }
  // Device memory with `streamed` streamed blocks, slots included.
  std::size_t device_bytes(int streamed) const;
  std::size_t device_bytes() const { return device_bytes(streamed()); }
  std::size_t host_bytes() const { return order_.size() * bytes_; }
  // The fewest streamed blocks, at least as many as now, with which the blocks take at most `bytes`
  // of the device; count() + 1 if there is no such number.
  int fewest(std::size_t bytes) const;

  // Says how many blocks are streamed, before allocate().
  void plan(int streamed);
  // Allocates all memory, without contents. Throws OutOfMemoryError and HostMemoryError.
  void allocate(const char* purpose);
  // Streams so many blocks, at least as many as before, and keeps their contents. The device
  // addresses of some blocks change. No kernel and no copy may be running. Throws HostMemoryError
  // before anything changes.
  void move(int streamed, cudaStream_t stream);

  // The address of a block for kernels: its own memory, or the slot that before() fills.
  std::byte* device(int block) const;
  // The page-locked memory of a streamed block.
  std::byte* host(int block) const { return at(block).host.data(); }

  // An evaluation calls begin(), and before() and after() around each block, in order. All work
  // on the stream of the copies ends before the last block begins, so that a graph may be captured.
  void begin(cudaStream_t stream);
  void before(int block, cudaStream_t stream);
  void after(int block, cudaStream_t stream);
  // Waits for copies that an evaluation left behind because of an error.
  void synchronize() const { copies_.synchronize(); }

 private:
  struct Block {
    std::size_t bytes;
    DeviceBuffer device;  // of a resident block
    PinnedBuffer host;    // of a streamed one
    int slot = -1;        // of a streamed one
  };
  const Block& at(int block) const { return blocks_[static_cast<std::size_t>(block)]; }
  std::vector<int> spread(int streamed) const;
  void assign(std::vector<int> order);
  void copy_next();

  std::vector<Block> blocks_;
  std::size_t bytes_ = 0;   // of the largest block, which each block's memory has
  std::vector<int> order_;  // the streamed blocks
  std::vector<DeviceBuffer> slots_;
  std::size_t next_ = 0;  // the next one of order_ to copy
  Stream copies_;
  Event begun_, copied_[kSlots], freed_[kSlots];
};

}  // namespace zimage_rt
