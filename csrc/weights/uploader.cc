#include "weights/uploader.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/device.h"
#include "kernels/transpose.h"

namespace zimage_rt {

// The buffers and the stream of one thread.
class Uploader::Worker {
 public:
  explicit Worker(std::size_t chunk) : buffers_{PinnedBuffer(chunk), PinnedBuffer(chunk)} {}
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  // After an error, copies from these buffers may still be in flight.
  ~Worker() { cudaStreamSynchronize(stream_.get()); }

  // Copies chunks from a shared list, double-buffered. `transposed_bytes`: see Uploader.
  void copy(const std::vector<Chunk>& chunks, std::atomic<std::size_t>& next,
            std::size_t transposed_bytes) {
    for (std::size_t round = 0;; ++round) {
      const std::size_t i = next.fetch_add(1);
      if (i >= chunks.size()) break;
      ZRT_CUDA(cudaEventSynchronize(copied_[round % 2].get()));
      send(chunks[i], round % 2, transposed_bytes);
      ZRT_CUDA(cudaEventRecord(copied_[round % 2].get(), stream_.get()));
    }
    stream_.synchronize();
  }

 private:
  void send(const Chunk& chunk, std::size_t buffer, std::size_t transposed_bytes) {
    const Part& part = chunk.part;
    if (part.bytes > buffers_[buffer].bytes()) buffers_[buffer] = PinnedBuffer(part.bytes);
    std::byte* const from = buffers_[buffer].data();
    std::byte* target = part.target;
    if (part.columns > 0) {
      if (part.bytes > staging_[buffer].bytes())
        staging_[buffer] = DeviceBuffer(transposed_bytes, "transposing matrices");
      target = staging_[buffer].data();
    }
    std::memcpy(from, part.source, part.bytes);
    ZRT_CUDA(cudaMemcpyAsync(target, from, part.bytes, cudaMemcpyHostToDevice, stream_.get()));
    if (part.columns > 0)
      transpose(target, part.target, part.element_bytes, part.rows, part.columns, chunk.stride,
                stream_.get());
  }

  Stream stream_;
  PinnedBuffer buffers_[2];
  DeviceBuffer staging_[2];
  Event copied_[2];
};

std::vector<Uploader::Chunk> Uploader::split(const std::vector<Part>& parts, std::size_t chunk) {
  std::vector<Chunk> chunks;
  for (const Part& part : parts) {
    if (part.columns == 0) {
      for (std::size_t at = 0; at < part.bytes; at += chunk)
        chunks.push_back({.part = {.source = part.source + at,
                                   .target = part.target + at,
                                   .bytes = std::min(chunk, part.bytes - at)}});
      continue;
    }
    const auto element = static_cast<std::size_t>(part.element_bytes);
    const std::size_t row = static_cast<std::size_t>(part.columns) * element;
    const int fitting = std::max(1, static_cast<int>(chunk / row));
    // Whole tiles of the kernel, if one fits.
    const int step = fitting < kTransposeTile ? fitting : fitting / kTransposeTile * kTransposeTile;
    for (int first = 0; first < part.rows; first += step) {
      const int rows = std::min(step, part.rows - first);
      chunks.push_back({.part = {.source = part.source + static_cast<std::size_t>(first) * row,
                                 .target = part.target + static_cast<std::size_t>(first) * element,
                                 .bytes = static_cast<std::size_t>(rows) * row,
                                 .rows = rows,
                                 .columns = part.columns,
                                 .element_bytes = part.element_bytes},
                        .stride = part.rows});
    }
  }
  return chunks;
}

std::size_t Uploader::largest_transposed(const std::vector<Chunk>& chunks) {
  std::size_t largest = 0;
  for (const Chunk& chunk : chunks)
    if (chunk.part.columns > 0) largest = std::max(largest, chunk.part.bytes);
  return largest;
}

std::size_t Uploader::count(const std::vector<Part>& parts, std::size_t chunk) {
  return split(parts, chunk).size();
}

std::size_t Uploader::transpose_bytes(const std::vector<Part>& parts, std::size_t chunk,
                                      std::size_t threads) {
  const std::vector<Chunk> chunks = split(parts, chunk);
  const auto transposed = std::count_if(chunks.begin(), chunks.end(),
                                        [](const Chunk& it) { return it.part.columns > 0; });
  return std::min(2 * threads, static_cast<std::size_t>(transposed)) * largest_transposed(chunks);
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
  chunks_ = split(parts, chunk_);
  if (chunks_.empty()) return;
  // Sequential reads are faster from disks.
  std::sort(chunks_.begin(), chunks_.end(), [](const Chunk& a, const Chunk& b) {
    return std::less<const std::byte*>()(a.part.source, b.part.source);
  });
  transposed_bytes_ = largest_transposed(chunks_);
  next_ = 0;
  busy_ = threads_.size();
  ++calls_;
  called_.notify_all();
  done_.wait(lock, [&] { return busy_ == 0; });
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Uploader::read(int device) {
  std::optional<Worker> worker;
  std::size_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    called_.wait(lock, [&] { return ending_ || calls_ != seen; });
    if (ending_) return;
    seen = calls_;
    lock.unlock();
    std::exception_ptr failure;
    try {
      if (!worker) {
        ZRT_CUDA(cudaSetDevice(device));
        worker.emplace(chunk_);
      }
      worker->copy(chunks_, next_, transposed_bytes_);
    } catch (...) {
      failure = std::current_exception();
      next_ = chunks_.size();  // so that the other threads stop
      worker.reset();
    }
    lock.lock();
    if (failure) failure_ = failure;
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace zimage_rt
