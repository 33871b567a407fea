#include "weights/weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "device/check.h"
#include "device/dtype.h"
#include "kernels/low_rank.h"

namespace zimage_rt {
namespace {

constexpr std::size_t kAlignment = 256;  // what cudaMalloc gives, and vector loads need
constexpr std::size_t kChunk = std::size_t{4} << 20;
// Of a group: at its beginning and its end the bus waits for one chunk.
constexpr std::size_t kGroupChunk = std::size_t{2} << 20;
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

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::size_t readers() {
  return std::max(1u, std::min(kReaders, std::thread::hardware_concurrency()));
}

// Floats of a change's factors.
std::size_t down_count(const LowRank& change) {
  if (change.down == nullptr) return 0;
  return static_cast<std::size_t>(change.rank) * static_cast<std::size_t>(change.rows);
}
std::size_t up_count(const LowRank& change) {
  const int rows = change.down == nullptr ? change.rows : change.rank;
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(change.columns);
}

}  // namespace

Weights::Weights(const std::string& path, std::vector<WeightEntry> entries) : path_(path) {
  for (WeightEntry& entry : entries) {
    const std::size_t bytes = TensorView{.dtype = entry.dtype, .shape = entry.shape}.bytes();
    check_storage(entry);
    Place place{.entry = std::move(entry), .bytes = bytes, .device_offset = bytes_};
    if (!place.entry.host) bytes_ += aligned(bytes);
    const std::string name = place.entry.name;
    entries_.emplace(name, std::move(place));
  }
  if (storage_ == DType::kFloat32)
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

// Kernels compute a module in one format: all tensors of 16 bits must share it.
void Weights::check_storage(const WeightEntry& entry) {
  if (entry.dtype == DType::kFloat32) return;
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
  shared_bytes_ = kAlignment;  // the word in which keep() finds an overflow
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

std::size_t Weights::bytes_with(const std::vector<LowRank>& changes, bool add) const {
  std::map<int, std::size_t> bytes;
  for (const auto& [number, group] : groups_) bytes[number] = group.bytes;
  for (const LowRank& change : changes)
    bytes[place_of(change).group] += (down_count(change) + up_count(change)) * sizeof(float);
  if (add)
    for (const Kept& kept : kept_)
      bytes[kept.place->group] += (kept.down.size() + kept.up.size()) * sizeof(float);
  std::size_t largest = 0;
  for (const auto& [number, size] : bytes) largest = std::max(largest, size);
  return shared_bytes_ + largest;
}

void Weights::turn(const std::function<bool(const std::string&)>& which) {
  for (auto& [name, place] : entries_) {
    place.turned = place.entry.dtype != DType::kFloat32 && place.entry.shape.size() == 2 &&
                   !place.entry.host && which(name);
  }
}

std::size_t Weights::staging_bytes() const {
  if (streams()) return 0;
  std::vector<Uploader::Part> parts;  // for their sizes: it does not matter where they go
  for (const auto& [name, place] : entries_)
    if (place.turned) parts.push_back(part(place, const_cast<std::byte*>(map_)));
  return Uploader::turning_bytes(parts, kChunk, readers());
}

bool Weights::turned(const std::string& name) const {
  const auto found = entries_.find(name);
  return found != entries_.end() && found->second.turned;
}

void Weights::upload(const std::string& purpose) {
  DeviceBuffer buffer(bytes_, purpose.c_str());
  std::vector<const Place*> places;
  for (const auto& [name, place] : entries_)
    if (!place.entry.host && place.group < 0) places.push_back(&place);
  copy(places, buffer.data());
  device_ = std::move(buffer);
  changed_.clear();
}

Uploader::Part Weights::part(const Place& place, std::byte* device) const {
  Uploader::Part part{.source = map_ + place.entry.offset,
                      .target = device + place.device_offset,
                      .bytes = place.bytes};
  if (place.turned) {
    part.rows = static_cast<int>(place.entry.shape[0]);
    part.columns = static_cast<int>(place.entry.shape[1]);
  }
  return part;
}

// Tensors from the file to their places on the device, turned where they are to be.
void Weights::copy(const std::vector<const Place*>& places, std::byte* device) const {
  std::vector<Uploader::Part> parts;
  for (const Place* const place : places) parts.push_back(part(*place, device));
  if (uploader_) return uploader_->copy(parts);
  // No more threads, each with page-locked memory, than there are chunks.
  Uploader(kChunk, std::min(readers(), Uploader::count(parts, kChunk))).copy(parts);
}

const Weights::Place& Weights::place_of(const LowRank& change) const {
  const auto found = entries_.find(change.tensor);
  bool fits = found != entries_.end() && !found->second.entry.host &&
              (!streams() || found->second.group >= 0);
  if (fits) {
    const std::vector<std::int64_t>& shape = found->second.entry.shape;
    fits = (shape.size() == 2 || shape.size() == 1) && change.first_column >= 0 &&
           change.rows == (shape.size() == 2 ? shape[0] : 1) &&
           change.first_column + change.columns <= shape.back();
  }
  if (!fits)
    throw WeightError(path_ + ": no matrix " + change.tensor + " of " +
                      std::to_string(change.rows) + " rows and " +
                      std::to_string(change.first_column + change.columns) +
                      " columns or more; export the bundle again");
  return found->second;
}

void Weights::change(const std::vector<LowRank>& changes, cudaStream_t stream, bool add) {
  if (streams()) return keep(changes, stream, add);
  std::size_t floats = 0;
  for (const LowRank& change : changes) {
    place_of(change);
    floats += down_count(change) + up_count(change);
  }
  DeviceBuffer factors((floats + 1) * sizeof(float), "the LoRAs");
  if (!add) {
    std::vector<const Place*> places;
    for (const std::string& name : changed_) places.push_back(&entries_.at(name));
    copy(places, device_.data());
    changed_.clear();
  }

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
    const float* const down =
        change.down == nullptr ? nullptr : upload_factor(change.down, down_count(change));
    const float* const up = upload_factor(change.up, up_count(change));
    changed_.insert(change.tensor);
    update(place_of(change), change, down, up, device_.data(), overflow, stream);
  }
  check_range(overflow, stream);
}

void Weights::update(const Place& place, const LowRank& change, const float* down, const float* up,
                     std::byte* device, int* overflow, cudaStream_t stream) const {
  LowRankUpdate args{};
  args.matrix = device + place.device_offset;
  args.type = place.entry.dtype;
  args.rank = change.rank;
  args.overflow = overflow;
  if (place.turned) {
    // The transpose of downᵀ @ up is upᵀ @ down, and the columns are rows.
    args.matrix =
        static_cast<std::byte*>(args.matrix) +
        static_cast<std::size_t>(change.first_column) * change.rows * size_of(place.entry.dtype);
    args.rows = change.columns, args.columns = change.rows;
    args.stride = change.rows;
    args.down = up, args.up = down;
    args.delta_row = 1, args.delta_column = change.columns;
  } else {
    args.rows = change.rows, args.columns = change.columns;
    args.stride = place.entry.shape.back();
    args.first_column = change.first_column;
    args.down = down, args.up = up;
    args.delta_row = change.columns, args.delta_column = 1;
  }
  if (down == nullptr) args.rank = 0, args.delta = up;
  low_rank_update(args, stream);
}

void Weights::check_range(const int* overflow, cudaStream_t stream) const {
  int overflowed = 0;
  ZRT_CUDA(cudaMemcpyAsync(&overflowed, overflow, sizeof(int), cudaMemcpyDeviceToHost, stream));
  ZRT_CUDA(cudaStreamSynchronize(stream));
  if (overflowed != 0)
    throw RangeError(path_ + ": the LoRAs' sum does not fit into " + name_of(storage_) +
                     "; use smaller weights or a bf16 bundle");
}

void Weights::bring(int group, cudaStream_t stream) {
  bring(group, groups_.at(group).places, kept_, device_.data(), stream);
}

void Weights::bring(int group, const std::vector<const Place*>& places,
                    const std::vector<Kept>& changes, std::byte* device,
                    cudaStream_t stream) const {
  std::vector<Uploader::Part> parts;
  for (const Place* const place : places) parts.push_back(part(*place, device));
  struct Factors {
    const Kept& kept;
    const float* down;
    const float* up;
  };
  std::vector<Factors> found;
  std::byte* next = device + shared_bytes_ + groups_.at(group).bytes;
  const auto add = [&](const std::vector<float>& factor) {
    std::byte* const target = next;
    next += factor.size() * sizeof(float);
    parts.push_back({.source = reinterpret_cast<const std::byte*>(factor.data()),
                     .target = target,
                     .bytes = factor.size() * sizeof(float)});
    return reinterpret_cast<const float*>(target);
  };
  for (const Kept& kept : changes)
    if (kept.place->group == group) {
      const float* const down = kept.down.empty() ? nullptr : add(kept.down);
      found.push_back({.kept = kept, .down = down, .up = add(kept.up)});
    }
  // What lies there may still be read.
  ZRT_CUDA(cudaStreamSynchronize(stream));
  uploader_->copy(parts);
  for (const Factors& factors : found)
    update(*factors.kept.place, factors.kept.change, factors.down, factors.up, device,
           reinterpret_cast<int*>(device), stream);
}

void Weights::keep(const std::vector<LowRank>& changes, cudaStream_t stream, bool add) {
  const std::size_t bytes = bytes_with(changes, add);
  std::vector<Kept> kept;
  std::map<int, std::set<const Place*>> places;
  for (const LowRank& change : changes) {
    const Place& place = place_of(change);
    kept.push_back({.place = &place,
                    .change = change,
                    .down = change.down == nullptr
                                ? std::vector<float>()
                                : std::vector<float>(change.down, change.down + down_count(change)),
                    .up = {change.up, change.up + up_count(change)}});
    kept.back().change.down = kept.back().change.up = nullptr;  // the caller's
    places[place.group].insert(&place);
  }
  if (!kept.empty()) {
    const DeviceBuffer memory(bytes, "the LoRAs");
    auto* const overflow = reinterpret_cast<int*>(memory.data());
    ZRT_CUDA(cudaMemsetAsync(overflow, 0, sizeof(int), stream));
    for (const auto& [group, changed] : places)
      bring(group, {changed.begin(), changed.end()}, kept, memory.data(), stream);
    check_range(overflow, stream);
  }
  if (add)
    for (Kept& earlier : kept_) kept.push_back(std::move(earlier));
  kept_ = std::move(kept);
  bytes_ = bytes;
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
  return {.data = data, .dtype = dtype, .shape = place.entry.shape};
}

}  // namespace zimage_rt
