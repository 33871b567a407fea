#include "weights/weights.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "weights/streamed_blocks.h"
#include "weights/uploader.h"

namespace zimage_rt {
namespace {

constexpr std::size_t kAlignment = 256;  // as cudaMalloc aligns, and as vector loads need
constexpr std::size_t kChunk = std::size_t{4} << 20;
// For groups: the bus is idle for one chunk at the beginning and one at the end of each.
constexpr std::size_t kGroupChunk = std::size_t{2} << 20;
// One thread copies from the page cache at 5 to 10 GB/s; the bus takes 50.
constexpr unsigned kReaders = 8;

template <typename Shape>
std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (const std::int64_t size : shape)
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::size_t readers() {
  return std::max(1u, std::min(kReaders, std::thread::hardware_concurrency()));
}

}  // namespace

Weights::Weights(const std::string& path, std::vector<WeightEntry> entries, bool takes_fp32)
    : path_(path) {
  for (WeightEntry& entry : entries) {
    const std::size_t bytes = TensorView{.dtype = entry.dtype, .shape = entry.shape}.bytes();
    check_storage(entry);
    Place place{.entry = std::move(entry), .bytes = bytes, .device_offset = bytes_};
    if (is_8bit(place.entry.dtype) && place.entry.shape.size() == 2) place.layout = Layout::kOutIn;
    if (!place.entry.host) bytes_ += aligned(bytes);
    const std::string name = place.entry.name;
    entries_.emplace(name, std::move(place));
  }
  if (is_fp32() && !takes_fp32)
    throw WeightError(path +
                      ": expected matrices in fp16 or bf16, got fp32 alone; export the "
                      "bundle again with --precision bf16");
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

DType Weights::storage() const {
  if (is_fp32()) throw WeightError(path_ + ": expected matrices in fp16 or bf16, got fp32 alone");
  return storage_;
}

// Kernels compute a module in one format, which all 16-bit tensors must share.
void Weights::check_storage(const WeightEntry& entry) {
  if (entry.dtype == DType::kFloat32 || is_8bit(entry.dtype)) return;
  if (storage_ == DType::kFloat32) {
    storage_ = entry.dtype;
    storage_from_ = entry.name;
  } else if (entry.dtype != storage_) {
    throw WeightError(path_ + ": tensor " + entry.name + " is " + name_of(entry.dtype) + ", but " +
                      storage_from_ + " is " + name_of(storage_) +
                      "; expected one format in a file: export the bundle again");
  }
}

Weights::~Weights() {
  if (map_ != nullptr) munmap(const_cast<std::byte*>(map_), map_bytes_);
}

void Weights::stream(const std::function<int(const std::string&)>& group_of) {
  shared_bytes_ = kAlignment;  // the overflow flag of defer_patches()
  for (auto& [name, place] : entries_) {
    if (place.entry.host) continue;
    place.group = group_of(name);
    std::size_t& end = place.group < 0 ? shared_bytes_ : groups_[place.group].bytes;
    place.device_offset = end;
    end += aligned(place.bytes);
    if (place.group >= 0) groups_[place.group].places.push_back(&place);
  }
  for (auto& [name, place] : entries_)
    if (place.group >= 0) place.device_offset += shared_bytes_;
  bytes_ = bytes_with({});
  uploader_ = std::make_unique<Uploader>(kGroupChunk, readers());
}

void Weights::transpose_on_upload(const std::function<bool(const std::string&)>& selects) {
  for (auto& [name, place] : entries_) {
    const bool transposed = place.entry.dtype != DType::kFloat32 && place.entry.shape.size() == 2 &&
                            !place.entry.host && (is_8bit(place.entry.dtype) || selects(name));
    place.layout = transposed ? Layout::kOutIn : Layout::kInOut;
  }
}

void Weights::split_blocks(const std::function<int(const std::string&)>& block_of) {
  std::vector<std::size_t> sizes;
  bytes_ = 0;
  for (auto& [name, place] : entries_) {
    if (place.entry.host) continue;
    place.block = block_of(name);
    if (place.block >= static_cast<int>(sizes.size()))
      sizes.resize(static_cast<std::size_t>(place.block) + 1);
    std::size_t& end = place.block < 0 ? bytes_ : sizes[static_cast<std::size_t>(place.block)];
    place.device_offset = end;
    end += aligned(place.bytes);
  }
  blocks_ = std::make_unique<StreamedBlocks>(std::move(sizes));
}

std::size_t Weights::staging_bytes() const {
  if (streams()) return 0;
  std::vector<Uploader::Part> parts;  // only their sizes matter here
  for (const auto& [name, place] : entries_)
    if (place.layout == Layout::kOutIn) parts.push_back(part(place, const_cast<std::byte*>(map_)));
  return Uploader::transpose_bytes(parts, kChunk, readers());
}

void Weights::upload(const std::string& purpose) {
  DeviceBuffer buffer(bytes_, purpose.c_str());
  if (blocks_) blocks_->allocate(purpose.c_str());
  std::vector<Uploader::Part> parts;
  std::map<int, std::vector<Uploader::Part>> streamed;  // by block
  for (const auto& [name, place] : entries_) {
    if (place.entry.host || place.group >= 0) continue;
    if (place.block < 0)
      parts.push_back(part(place, buffer.data()));
    else
      (blocks_->is_streamed(place.block) ? streamed[place.block] : parts)
          .push_back(part(place, blocks_->device(place.block)));
  }
  std::optional<Uploader> own;
  copy(parts, own);
  // By way of a slot, because matrices are transposed on the device.
  for (const auto& [block, its_parts] : streamed) {
    copy(its_parts, own);
    ZRT_CUDA(cudaMemcpy(blocks_->host(block), blocks_->device(block), blocks_->bytes(block),
                        cudaMemcpyDeviceToHost));
  }
  device_ = std::move(buffer);
  patched_.clear();
}

Uploader::Part Weights::part(const Place& place, std::byte* device) const {
  Uploader::Part part{.source = map_ + place.entry.offset,
                      .target = device + place.device_offset,
                      .bytes = place.bytes};
  if (place.layout == Layout::kOutIn) {
    part.rows = static_cast<int>(place.entry.shape[0]);
    part.columns = static_cast<int>(place.entry.shape[1]);
    part.element_bytes = static_cast<int>(size_of(place.entry.dtype));
  }
  return part;
}

// Copies tensors from the file to the device; `own` is the uploader of one call, made when needed.
void Weights::copy(const std::vector<Uploader::Part>& parts, std::optional<Uploader>& own) const {
  if (parts.empty()) return;
  if (uploader_) return uploader_->copy(parts);
  // No more threads, each with page-locked memory, than there are chunks in all.
  if (!own)
    own.emplace(kChunk, blocks_ ? readers() : std::min(readers(), Uploader::count(parts, kChunk)));
  own->copy(parts);
}

std::byte* Weights::memory_of(const Place& place) const {
  return place.block < 0 ? device_.data() : blocks_->device(place.block);
}

const Weights::Place& Weights::find(const std::string& name, const std::string& shape) const {
  const auto found = entries_.find(name);
  if (found == entries_.end())
    throw WeightError(path_ + ": tensor " + name + " " + shape +
                      " is missing; export the bundle again");
  return found->second;
}

TensorView Weights::get(const std::string& name, std::initializer_list<std::int64_t> shape,
                        DType dtype) const {
  const Place& place = find(name, shape_text(shape));
  if (!std::equal(shape.begin(), shape.end(), place.entry.shape.begin(), place.entry.shape.end()) ||
      dtype != place.entry.dtype)
    throw WeightError(path_ + ": tensor " + name + ": expected " + name_of(dtype) + " " +
                      shape_text(shape) + ", got " + name_of(place.entry.dtype) + " " +
                      shape_text(place.entry.shape) + "; export the bundle again");
  std::byte* const data = place.entry.host ? const_cast<std::byte*>(map_) + place.entry.offset
                                           : memory_of(place) + place.device_offset;
  return {.data = data, .dtype = dtype, .shape = place.entry.shape};
}

Matrix Weights::matrix(const std::string& name, int in, int out) const {
  const auto found = entries_.find(name);
  const bool quantized = found != entries_.end() && is_8bit(found->second.entry.dtype);
  const TensorView view = get(name, {in, out}, quantized ? found->second.entry.dtype : storage());
  return {.data = view.data,
          .dtype = view.dtype,
          .layout = entries_.at(name).layout,
          .in = in,
          .out = out,
          .scales = quantized ? vector(name + "_scale", out) : nullptr,
          .rotation = quantized ? rotation(in) : Rotation::kNone};
}

const float* Weights::vector(const std::string& name, std::int64_t size) const {
  return get(name, {size}, DType::kFloat32).f32();
}

int Weights::axis(const std::string& name, std::size_t rank, std::size_t index) const {
  const std::vector<std::int64_t>& shape =
      find(name, "of rank " + std::to_string(rank)).entry.shape;
  constexpr std::int64_t kLargest = std::numeric_limits<int>::max();
  if (shape.size() != rank || shape[index] < 1 || shape[index] > kLargest)
    throw WeightError(path_ + ": tensor " + name + ": expected " + std::to_string(rank) +
                      (rank == 1 ? " axis" : " axes") + ", got " + shape_text(shape) +
                      "; export the bundle again");
  return static_cast<int>(shape[index]);
}

}  // namespace zimage_rt
