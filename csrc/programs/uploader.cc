#include "programs/uploader.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <optional>
#include <utility>

#include "zimage_rt/check.h"
#include "zimage_rt/device.h"

namespace zimage_rt {
namespace {

// What one thread copies with.
class Lane {
 public:
  explicit Lane(std::size_t chunk) : buffers_{PinnedBuffer(chunk), PinnedBuffer(chunk)} {}
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  // After an error copies may still be under way, out of the buffers that go now.
  ~Lane() { cudaStreamSynchronize(stream_.get()); }

  // Copies chunks that it takes from a shared list, two buffers deep.
  void copy(const std::vector<Uploader::Part>& chunks, std::atomic<std::size_t>& next) {
    for (std::size_t turn = 0;; ++turn) {
      const std::size_t i = next.fetch_add(1);
      if (i >= chunks.size()) break;
      PinnedBuffer& buffer = buffers_[turn % 2];
      ZRT_CUDA(cudaEventSynchronize(copied_[turn % 2].get()));
      std::memcpy(buffer.data(), chunks[i].source, chunks[i].bytes);
      ZRT_CUDA(cudaMemcpyAsync(chunks[i].target, buffer.data(), chunks[i].bytes,
                               cudaMemcpyHostToDevice, stream_.get()));
      ZRT_CUDA(cudaEventRecord(copied_[turn % 2].get(), stream_.get()));
    }
    stream_.synchronize();
  }

 private:
  Stream stream_;
  PinnedBuffer buffers_[2];
  Event copied_[2];
};

}  // namespace

std::size_t Uploader::count(const std::vector<Part>& parts, std::size_t chunk) {
  std::size_t chunks = 0;
  for (const Part& part : parts) chunks += (part.bytes + chunk - 1) / chunk;
  return chunks;
}

Uploader::Uploader(std::size_t chunk, std::size_t threads) : chunk_(chunk) {
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  try {
    for (std::size_t i = 0; i < threads; ++i)
      threads_.emplace_back([this, device] { read(device); });
  } catch (...) {
    end();
    throw;
  }
}

Uploader::~Uploader() { end(); }

void Uploader::end() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  called_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Uploader::copy(const std::vector<Part>& parts) {
  std::unique_lock<std::mutex> lock(mutex_);
  chunks_.clear();
  chunks_.reserve(count(parts, chunk_));
  for (const Part& part : parts)
    for (std::size_t at = 0; at < part.bytes; at += chunk_)
      chunks_.push_back({part.source + at, part.target + at, std::min(chunk_, part.bytes - at)});
  if (chunks_.empty()) return;
  // In the file's order, as disks like it.
  std::sort(chunks_.begin(), chunks_.end(), [](const Part& a, const Part& b) {
    return std::less<const std::byte*>()(a.source, b.source);
  });
  next_ = 0;
  busy_ = threads_.size();
  ++calls_;
  called_.notify_all();
  done_.wait(lock, [&] { return busy_ == 0; });
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Uploader::read(int device) {
  std::optional<Lane> lane;
  std::size_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    called_.wait(lock, [&] { return ending_ || calls_ != seen; });
    if (ending_) return;
    seen = calls_;
    lock.unlock();
    std::exception_ptr failure;
    try {
      if (!lane) {
        ZRT_CUDA(cudaSetDevice(device));
        lane.emplace(chunk_);
      }
      lane->copy(chunks_, next_);
    } catch (...) {
      failure = std::current_exception();
      next_ = chunks_.size();  // the others stop, too
      lane.reset();
    }
    lock.lock();
    if (failure) failure_ = failure;
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace zimage_rt
