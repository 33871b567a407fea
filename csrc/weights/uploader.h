#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace zimage_rt {

// Copies host memory to the device through page-locked buffers, with several reader threads.
// Threads and buffers are kept, because creating them takes tens of milliseconds.
class Uploader {
 public:
  struct Part {
    const std::byte* source;
    std::byte* target;
    std::size_t bytes;
    // A matrix to transpose on the way; with 0 columns the bytes are copied unchanged.
    int rows = 0, columns = 0;
    int element_bytes = 2;  // of a matrix to transpose: 1 or 2
  };
  // The number of chunks that these parts are copied in.
  static std::size_t count(const std::vector<Part>& parts, std::size_t chunk);

  // Device memory that `threads` take at most for the transpositions of these parts.
  static std::size_t transpose_bytes(const std::vector<Part>& parts, std::size_t chunk,
                                     std::size_t threads);

  // For the current device. A copy has at most `chunk` bytes, or one row of a matrix to transpose.
  // Each thread has two such buffers on the host, and two on the device for transpositions,
  // allocated at its first copy.
  Uploader(std::size_t chunk, std::size_t threads);
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  ~Uploader();

  // Returns when all copies are complete. Throws CudaError, with no copy left in flight. One call
  // at a time.
  void copy(const std::vector<Part>& parts);

 private:
  void read(int device);  // the body of a thread
  void end();

  // A piece of a part; of a matrix to transpose, some rows, which become columns of an [out, in]
  // matrix with rows of `stride`.
  struct Chunk {
    Part part;
    int stride = 0;
  };
  static std::size_t largest_transposed(const std::vector<Chunk>& chunks);
  static std::vector<Chunk> split(const std::vector<Part>& parts, std::size_t chunk);
  class Worker;

  const std::size_t chunk_;
  std::mutex mutex_;
  std::condition_variable called_, done_;
  // Guarded by the mutex; the chunks do not change while threads are busy.
  std::vector<Chunk> chunks_;
  std::size_t transposed_bytes_ = 0;  // of the largest chunk to transpose
  std::size_t calls_ = 0;             // of copy()
  std::size_t busy_ = 0;              // threads that have not finished the current call
  bool ending_ = false;
  std::exception_ptr failure_;
  std::atomic<std::size_t> next_{0};
  std::vector<std::thread> threads_;
};

}  // namespace zimage_rt
