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

#include "kernels/low_rank.h"
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
  std::vector<const Place*> places;
  for (const auto& [name, place] : entries_)
    if (!place.entry.host) places.push_back(&place);
  copy(places, buffer.data());
  device_ = std::move(buffer);
  changed_.clear();
}

void Weights::copy(const std::vector<const Place*>& places, std::byte* target) const {
  std::vector<Chunk> chunks;
  for (const Place* const place : places)
    for (std::size_t at = 0; at < place->bytes; at += kChunk)
      chunks.push_back({map_ + place->entry.offset + at, target + place->device_offset + at,
                        std::min(kChunk, place->bytes - at)});
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
}

void Weights::change(const std::vector<LowRank>& changes, cudaStream_t stream) {
  std::size_t floats = 0;
  for (const LowRank& change : changes) {
    const auto found = entries_.find(change.tensor);
    const bool fits = found != entries_.end() && !found->second.entry.host &&
                      found->second.entry.shape.size() == 2 &&
                      found->second.entry.shape[0] == change.rows && change.first_column >= 0 &&
                      change.first_column + change.columns <= found->second.entry.shape[1];
    if (!fits)
      throw WeightError(path_ + ": no matrix " + change.tensor + " of " +
                        std::to_string(change.rows) + " rows and " +
                        std::to_string(change.first_column + change.columns) +
                        " columns or more; export the bundle again");
    floats += static_cast<std::size_t>(change.rank) *
              (static_cast<std::size_t>(change.rows) + static_cast<std::size_t>(change.columns));
  }
  DeviceBuffer factors((floats + 1) * sizeof(float), "the LoRAs");
  std::vector<const Place*> places;
  for (const std::string& name : changed_) places.push_back(&entries_.at(name));
  copy(places, device_.data());
  changed_.clear();

  auto* next = reinterpret_cast<float*>(factors.data());
  auto* const overflow = reinterpret_cast<int*>(next++);
  ZRT_CUDA(cudaMemsetAsync(overflow, 0, sizeof(int), stream));
  const auto upload_factor = [&](const float* source, std::size_t count) {
    float* const target = next;
    next += count;
    ZRT_CUDA(
        cudaMemcpyAsync(target, source, count * sizeof(float), cudaMemcpyHostToDevice, stream));
    return target;
  };
  for (const LowRank& change : changes) {
    const Place& place = entries_.at(change.tensor);
    const auto rank = static_cast<std::size_t>(change.rank);
    const float* const down = upload_factor(change.down, rank * change.rows);
    const float* const up = upload_factor(change.up, rank * change.columns);
    changed_.insert(change.tensor);
    low_rank_update(
        {device_.data() + place.device_offset, place.entry.dtype, change.rows, place.entry.shape[1],
         change.first_column, change.columns, change.rank, down, up, overflow},
        stream);
  }
  int overflowed = 0;
  ZRT_CUDA(cudaMemcpyAsync(&overflowed, overflow, sizeof(int), cudaMemcpyDeviceToHost, stream));
  ZRT_CUDA(cudaStreamSynchronize(stream));
  if (overflowed != 0)
    throw RangeError(path_ + ": the LoRAs' sum does not fit into " + name_of(storage_) +
                     "; use smaller weights or a bf16 bundle");
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
