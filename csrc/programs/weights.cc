#include "programs/weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "zimage_rt/check.h"

namespace zimage_rt {
namespace {

constexpr std::size_t kAlignment = 256;  // what cudaMalloc gives, and vector loads need
constexpr std::size_t kChunk = std::size_t{8} << 20;
// One thread copies from the page cache at 5 to 10 GB/s; the bus takes 50.
constexpr unsigned kReaders = 8;

const char* name_of(DType type) {
  return type == DType::kFloat32 ? "fp32" : type == DType::kFloat16 ? "fp16" : "bf16";
}

template <typename Shape>
std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (const std::int64_t size : shape)
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

struct Chunk {
  const std::byte* source;
  std::byte* target;
  std::size_t bytes;
};

// Copies chunks that it takes from a shared list, two page-locked buffers deep.
void copy_chunks(int device, const std::vector<Chunk>& chunks, std::atomic<std::size_t>& next) {
  ZRT_CUDA(cudaSetDevice(device));
  Stream stream;
  PinnedBuffer buffers[2] = {PinnedBuffer(kChunk), PinnedBuffer(kChunk)};
  Event copied[2];
  for (std::size_t turn = 0;; ++turn) {
    const std::size_t i = next.fetch_add(1);
    if (i >= chunks.size()) break;
    PinnedBuffer& buffer = buffers[turn % 2];
    ZRT_CUDA(cudaEventSynchronize(copied[turn % 2].get()));
    std::memcpy(buffer.data(), chunks[i].source, chunks[i].bytes);
    ZRT_CUDA(cudaMemcpyAsync(chunks[i].target, buffer.data(), chunks[i].bytes,
                             cudaMemcpyHostToDevice, stream.get()));
    ZRT_CUDA(cudaEventRecord(copied[turn % 2].get(), stream.get()));
  }
  stream.synchronize();
}

}  // namespace

Weights::Weights(const std::string& path, std::vector<WeightEntry> entries) : path_(path) {
  for (WeightEntry& entry : entries) {
    const std::size_t bytes = TensorView{nullptr, entry.dtype, entry.shape}.bytes();
    if (entry.dtype != DType::kFloat32) storage_ = entry.dtype;
    Place place{std::move(entry), bytes, bytes_};
    if (!place.entry.host) bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::string name = place.entry.name;
    entries_.emplace(name, std::move(place));
  }
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error(path + ": " + std::strerror(errno));
  struct stat status{};
  const bool known = fstat(file, &status) == 0;
  map_bytes_ = known ? static_cast<std::size_t>(status.st_size) : 0;
  bool whole = map_bytes_ > 0;
  for (const auto& [name, place] : entries_)
    whole = whole && place.entry.offset + place.bytes <= map_bytes_;
  void* const map = whole ? mmap(nullptr, map_bytes_, PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
  close(file);
  if (!whole) throw WeightError(path + ": the file is shorter than its header says");
  if (map == MAP_FAILED) throw std::runtime_error(path + ": " + std::strerror(errno));
  map_ = static_cast<const std::byte*>(map);
}

Weights::~Weights() {
  if (map_ != nullptr) munmap(const_cast<std::byte*>(map_), map_bytes_);
}

void Weights::upload(const std::string& purpose) {
  DeviceBuffer buffer(bytes_, purpose.c_str());
  std::vector<Chunk> chunks;
  for (const auto& [name, place] : entries_) {
    if (place.entry.host) continue;
    for (std::size_t at = 0; at < place.bytes; at += kChunk)
      chunks.push_back({map_ + place.entry.offset + at, buffer.data() + place.device_offset + at,
                        std::min(kChunk, place.bytes - at)});
  }
  // In the file's order, as disks like it.
  std::sort(chunks.begin(), chunks.end(),
            [](const Chunk& a, const Chunk& b) { return a.source < b.source; });
  int device = 0;
  ZRT_CUDA(cudaGetDevice(&device));
  const std::size_t limit = std::max(1u, std::min(kReaders, std::thread::hardware_concurrency()));
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  std::vector<std::thread> readers;
  for (std::size_t i = 0; i < std::min(limit, chunks.size()); ++i)
    readers.emplace_back([&] {
      try {
        copy_chunks(device, chunks, next);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        failure = std::current_exception();
        next = chunks.size();
      }
    });
  for (std::thread& reader : readers) reader.join();
  if (failure) std::rethrow_exception(failure);
  device_ = std::move(buffer);
}

TensorView Weights::get(const std::string& name, std::initializer_list<std::int64_t> shape,
                        DType dtype) const {
  const auto found = entries_.find(name);
  if (found == entries_.end())
    throw WeightError(path_ + ": tensor " + name + " " + shape_text(shape) +
                      " is missing; export the bundle again");
  const Place& place = found->second;
  if (!std::equal(shape.begin(), shape.end(), place.entry.shape.begin(), place.entry.shape.end()) ||
      dtype != place.entry.dtype)
    throw WeightError(path_ + ": tensor " + name + ": expected " + name_of(dtype) + " " +
                      shape_text(shape) + ", got " + name_of(place.entry.dtype) + " " +
                      shape_text(place.entry.shape) + "; export the bundle again");
  std::byte* const data = place.entry.host ? const_cast<std::byte*>(map_) + place.entry.offset
                                           : device_.data() + place.device_offset;
  return {data, dtype, place.entry.shape};
}

}  // namespace zimage_rt
