#include "weights/streamed_blocks.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/device.h"

namespace zimage_rt {
namespace {

void copy(std::byte* target, const std::byte* source, std::size_t bytes, cudaMemcpyKind kind,
          cudaStream_t stream) {
  ZRT_CUDA(cudaMemcpyAsync(target, source, bytes, kind, stream));
}

int slots_of(int streamed) { return std::min(streamed, StreamedBlocks::kSlots); }

}  // namespace

StreamedBlocks::StreamedBlocks(std::vector<std::size_t> bytes) {
  for (const std::size_t size : bytes) {
    blocks_.push_back({.bytes = size, .device = {}, .host = {}});
    bytes_ = std::max(bytes_, size);
  }
}

// Copies that an evaluation left behind still use the memory.
StreamedBlocks::~StreamedBlocks() { cudaStreamSynchronize(copies_.get()); }

std::size_t StreamedBlocks::device_bytes(int streamed) const {
  return static_cast<std::size_t>(count() - streamed + slots_of(streamed)) * bytes_;
}

int StreamedBlocks::fewest(std::size_t bytes) const {
  int number = streamed();
  while (number <= count() && device_bytes(number) > bytes) ++number;
  return number;
}

// Evenly among the resident ones, with as many of these as possible before the first copy is used.
std::vector<int> StreamedBlocks::spread(int streamed) const {
  std::vector<int> order;
  for (int i = 1; i <= streamed; ++i) order.push_back(i * count() / streamed - 1);
  return order;
}

void StreamedBlocks::assign(std::vector<int> order) {
  order_ = std::move(order);
  for (Block& block : blocks_) block.slot = -1;
  for (std::size_t i = 0; i < order_.size(); ++i)
    blocks_[static_cast<std::size_t>(order_[i])].slot = static_cast<int>(i) % kSlots;
}

void StreamedBlocks::plan(int streamed) { assign(spread(streamed)); }

void StreamedBlocks::allocate(const char* purpose) {
  std::vector<DeviceBuffer> slots;
  for (int i = 0; i < slots_of(streamed()); ++i) slots.emplace_back(bytes_, purpose);
  for (Block& block : blocks_) {
    if (block.slot < 0)
      block.device = DeviceBuffer(bytes_, purpose);
    else
      block.host = PinnedBuffer(bytes_);
  }
  slots_ = std::move(slots);
}

void StreamedBlocks::move(int streamed, cudaStream_t stream) {
  const std::vector<int> order = spread(streamed);
  std::vector<int> leaving, returning;
  std::set_difference(order.begin(), order.end(), order_.begin(), order_.end(),
                      std::back_inserter(leaving));
  std::set_difference(order_.begin(), order_.end(), order.begin(), order.end(),
                      std::back_inserter(returning));
  std::vector<PinnedBuffer> added;
  for (std::size_t i = returning.size(); i < leaving.size(); ++i) added.emplace_back(bytes_);
  synchronize();

  // A block that becomes resident takes the memory of one that is streamed from now on.
  std::size_t done = 0;
  for (const int number : returning) {
    Block& in = blocks_[static_cast<std::size_t>(number)];
    Block& out = blocks_[static_cast<std::size_t>(leaving[done++])];
    std::byte* const between = slots_.front().data();
    copy(between, in.host.data(), in.bytes, cudaMemcpyHostToDevice, stream);
    copy(in.host.data(), out.device.data(), out.bytes, cudaMemcpyDeviceToHost, stream);
    copy(out.device.data(), between, in.bytes, cudaMemcpyDeviceToDevice, stream);
    std::swap(in.device, out.device);
    std::swap(in.host, out.host);
  }
  for (PinnedBuffer& host : added) {
    Block& out = blocks_[static_cast<std::size_t>(leaving[done++])];
    copy(host.data(), out.device.data(), out.bytes, cudaMemcpyDeviceToHost, stream);
    out.host = std::move(host);
  }
  ZRT_CUDA(cudaStreamSynchronize(stream));
  // The first blocks' memory becomes the slots.
  for (const int number : leaving) {
    Block& out = blocks_[static_cast<std::size_t>(number)];
    if (out.device.data() != nullptr && static_cast<int>(slots_.size()) < slots_of(streamed))
      slots_.push_back(std::move(out.device));
    out.device.release();
  }
  assign(order);
}

std::byte* StreamedBlocks::device(int block) const {
  const int slot = at(block).slot;
  return slot < 0 ? at(block).device.data() : slots_[static_cast<std::size_t>(slot)].data();
}

void StreamedBlocks::begin(cudaStream_t stream) {
  next_ = 0;
  if (order_.empty()) return;
  ZRT_CUDA(cudaEventRecord(begun_.get(), stream));
  ZRT_CUDA(cudaStreamWaitEvent(copies_.get(), begun_.get()));
  for (std::size_t i = 0; i < slots_.size(); ++i) copy_next();
}

void StreamedBlocks::before(int block, cudaStream_t stream) {
  if (is_streamed(block)) ZRT_CUDA(cudaStreamWaitEvent(stream, copied_[at(block).slot].get()));
}

void StreamedBlocks::after(int block, cudaStream_t stream) {
  // After the last copy nothing is added to its stream, which would not join the captured one.
  if (!is_streamed(block) || next_ == order_.size()) return;
  const Event& freed = freed_[at(block).slot];
  ZRT_CUDA(cudaEventRecord(freed.get(), stream));
  ZRT_CUDA(cudaStreamWaitEvent(copies_.get(), freed.get()));
  copy_next();
}

// Copies the next streamed block to its slot, which is free.
void StreamedBlocks::copy_next() {
  const int number = order_[next_++];
  const Block& block = at(number);
  copy(device(number), block.host.data(), block.bytes, cudaMemcpyHostToDevice, copies_.get());
  ZRT_CUDA(cudaEventRecord(copied_[block.slot].get(), copies_.get()));
}

}  // namespace zimage_rt
