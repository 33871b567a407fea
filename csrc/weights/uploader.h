#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace zimage_rt {

// Copies host memory to the device through page-locked buffers, several threads reading. Threads
// and buffers live as long as this does: making them takes tens of milliseconds.
class Uploader {
 public:
  struct Part {
    const std::byte* source;
    std::byte* target;
    std::size_t bytes;
    // Of a matrix of 16-bit numbers that the device is to have turned; without, it stays as it is.
    int rows = 0, columns = 0;
  };
  // How many chunks these parts are copied in.
  static std::size_t count(const std::vector<Part>& parts, std::size_t chunk);

  // Device memory that `threads` of them take at most while they turn these parts' matrices.
  static std::size_t turning_bytes(const std::vector<Part>& parts, std::size_t chunk,
                                   std::size_t threads);

  // For the current device. A copy is of `chunk` bytes at most, or of one row of a matrix that is
  // turned; a thread has two buffers of them, which it makes at the first call of copy(). Matrices
  // are turned by way of as many buffers on the device.
  Uploader(std::size_t chunk, std::size_t threads);
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  ~Uploader();

  // Returns when everything is there. Throws CudaError; then nothing is under way any more. One
  // call at a time.
  void copy(const std::vector<Part>& parts);

 private:
  void read(int device);  // a thread's life
  void end();

  // A piece of a part; of a matrix that is turned some of its rows, which become columns of
  // `stride`.
  struct Chunk {
    Part part;
    int stride = 0;
  };
  static std::size_t largest_turned(const std::vector<Chunk>& chunks);
  static std::vector<Chunk> split(const std::vector<Part>& parts, std::size_t chunk);
  class Lane;

  const std::size_t chunk_;
  std::mutex mutex_;
  std::condition_variable called_, done_;
  // What follows is written under the lock; while threads are busy, the chunks stay as they are.
  std::vector<Chunk> chunks_;
  std::size_t turned_ = 0;  // bytes of the largest that is turned
  std::size_t calls_ = 0;
  std::size_t busy_ = 0;  // threads that have not finished this call
  bool ending_ = false;
  std::exception_ptr failure_;
  std::atomic<std::size_t> next_{0};
  std::vector<std::thread> threads_;
};

}  // namespace zimage_rt
