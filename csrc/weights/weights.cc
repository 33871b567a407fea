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
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/low_rank.h"
#include "kernels/patch_8bit.h"

namespace zimage_rt {
namespace {

constexpr std::size_t kAlignment = 256;  // as cudaMalloc aligns, and as vector loads need
constexpr std::size_t kChunk = std::size_t{4} << 20;
// For groups: the bus is idle for one chunk at the beginning and one at the end of each.
constexpr std::size_t kGroupChunk = std::size_t{2} << 20;
// One thread copies from the page cache at 5 to 10 GB/s; the bus takes 50.
constexpr unsigned kReaders = 8;

const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat32:
      return "fp32";
    case DType::kFloat16:
      return "fp16";
    case DType::kBFloat16:
      return "bf16";
    case DType::kInt8:
      return "int8";
    case DType::kFloat8:
      return "float8";
  }
  return "an unknown format";
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

// Floats in the factors of a patch.
std::size_t down_count(const WeightPatch& patch) {
  if (patch.down == nullptr) return 0;
  return static_cast<std::size_t>(patch.rank) * static_cast<std::size_t>(patch.rows);
}
std::size_t up_count(const WeightPatch& patch) {
  const int rows = patch.down == nullptr ? patch.rows : patch.rank;
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(patch.columns);
}

}  // namespace

Weights::Weights(const std::string& path, std::vector<WeightEntry> entries) : path_(path) {
  for (WeightEntry& entry : entries) {
    const std::size_t bytes = TensorView{.dtype = entry.dtype, .shape = entry.shape}.bytes();
    check_storage(entry);
    Place place{.entry = std::move(entry), .bytes = bytes, .device_offset = bytes_};
    if (is_8bit(place.entry.dtype) && place.entry.shape.size() == 2) place.layout = Layout::kOutIn;
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

std::size_t Weights::bytes_with(const std::vector<WeightPatch>& patches, bool add) const {
  std::map<int, std::size_t> bytes;
  for (const auto& [number, group] : groups_) bytes[number] = group.bytes;
  for (const WeightPatch& patch : patches)
    bytes[place_of(patch).group] += (down_count(patch) + up_count(patch)) * sizeof(float);
  if (add)
    for (const DeferredPatch& deferred : deferred_)
      bytes[deferred.place->group] += (deferred.down.size() + deferred.up.size()) * sizeof(float);
  std::size_t largest = 0;
  for (const auto& [number, size] : bytes) largest = std::max(largest, size);
  return shared_bytes_ + largest;
}

void Weights::transpose_on_upload(const std::function<bool(const std::string&)>& selects) {
  for (auto& [name, place] : entries_) {
    const bool transposed = place.entry.dtype != DType::kFloat32 && place.entry.shape.size() == 2 &&
                            !place.entry.host && (is_8bit(place.entry.dtype) || selects(name));
    place.layout = transposed ? Layout::kOutIn : Layout::kInOut;
  }
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
  std::vector<const Place*> places;
  for (const auto& [name, place] : entries_)
    if (!place.entry.host && place.group < 0) places.push_back(&place);
  copy(places, buffer.data());
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

// Copies tensors from the file to the device, in the layouts that they have there.
void Weights::copy(const std::vector<const Place*>& places, std::byte* device) const {
  std::vector<Uploader::Part> parts;
  for (const Place* const place : places) parts.push_back(part(*place, device));
  if (uploader_) return uploader_->copy(parts);
  // No more threads, each with page-locked memory, than there are chunks.
  Uploader(kChunk, std::min(readers(), Uploader::count(parts, kChunk))).copy(parts);
}

const Weights::Place& Weights::place_of(const WeightPatch& patch) const {
  const auto found = entries_.find(patch.tensor);
  bool fits = found != entries_.end() && !found->second.entry.host &&
              (!streams() || found->second.group >= 0);
  if (fits) {
    const std::vector<std::int64_t>& shape = found->second.entry.shape;
    fits = (shape.size() == 2 || shape.size() == 1) && patch.first_column >= 0 &&
           patch.rows == (shape.size() == 2 ? shape[0] : 1) &&
           patch.first_column + patch.columns <= shape.back();
  }
  if (!fits)
    throw WeightError(path_ + ": no matrix " + patch.tensor + " of " + std::to_string(patch.rows) +
                      " rows and " + std::to_string(patch.first_column + patch.columns) +
                      " columns or more; export the bundle again");
  return found->second;
}

void Weights::patch(const std::vector<WeightPatch>& patches, cudaStream_t stream, bool add) {
  if (streams()) return defer_patches(patches, stream, add);
  std::size_t floats = 0;
  for (const WeightPatch& patch : patches) {
    place_of(patch);
    floats += down_count(patch) + up_count(patch);
  }
  DeviceBuffer factors((floats + 1) * sizeof(float), "the LoRAs");
  if (!add) {
    std::vector<const Place*> places;
    for (const std::string& name : patched_) places.push_back(&entries_.at(name));
    copy(places, device_.data());
    patched_.clear();
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
  for (const WeightPatch& patch : patches) {
    const float* const down =
        patch.down == nullptr ? nullptr : upload_factor(patch.down, down_count(patch));
    const float* const up = upload_factor(patch.up, up_count(patch));
    patched_.insert(patch.tensor);
    if (is_8bit(place_of(patch).entry.dtype)) patched_.insert(patch.tensor + "_scale");
    apply(place_of(patch), patch, down, up, device_.data(), overflow, stream);
  }
  check_range(overflow, stream);
}

void Weights::apply(const Place& place, const WeightPatch& patch, const float* down,
                    const float* up, std::byte* device, int* overflow, cudaStream_t stream) const {
  if (is_8bit(place.entry.dtype)) {
    const Place& scales = find(patch.tensor + "_scale", "");
    const auto first = static_cast<std::size_t>(patch.first_column);
    patch_8bit(
        {.matrix = device + place.device_offset + first * static_cast<std::size_t>(patch.rows),
         .scales = reinterpret_cast<float*>(device + scales.device_offset) + first,
         .type = place.entry.dtype,
         .rotation = rotation(patch.rows),
         .rows = patch.columns,
         .in = patch.rows,
         .rank = down == nullptr ? 0 : patch.rank,
         .down = down,
         .up = up,
         .delta = down == nullptr ? up : nullptr,
         .overflow = overflow},
        stream);
    return;
  }
  LowRankUpdate args{};
  args.matrix = device + place.device_offset;
  args.type = place.entry.dtype;
  args.rank = patch.rank;
  args.overflow = overflow;
  if (place.layout == Layout::kOutIn) {
    // The transpose of downᵀ @ up is upᵀ @ down, and the patched columns are rows.
    args.matrix =
        static_cast<std::byte*>(args.matrix) +
        static_cast<std::size_t>(patch.first_column) * patch.rows * size_of(place.entry.dtype);
    args.rows = patch.columns, args.columns = patch.rows;
    args.stride = patch.rows;
    args.down = up, args.up = down;
    args.delta_row = 1, args.delta_column = patch.columns;
  } else {
    args.rows = patch.rows, args.columns = patch.columns;
    args.stride = place.entry.shape.back();
    args.first_column = patch.first_column;
    args.down = down, args.up = up;
    args.delta_row = patch.columns, args.delta_column = 1;
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

void Weights::load_group(int group, cudaStream_t stream) {
  load_group(group, groups_.at(group).places, deferred_, device_.data(), stream);
}

void Weights::load_group(int group, const std::vector<const Place*>& places,
                         const std::vector<DeferredPatch>& patches, std::byte* device,
                         cudaStream_t stream) const {
  std::vector<Uploader::Part> parts;
  for (const Place* const place : places) parts.push_back(part(*place, device));
  struct Factors {
    const DeferredPatch& deferred;
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
  for (const DeferredPatch& deferred : patches)
    if (deferred.place->group == group) {
      const float* const down = deferred.down.empty() ? nullptr : add(deferred.down);
      found.push_back({.deferred = deferred, .down = down, .up = add(deferred.up)});
    }
  // Kernels in flight may still read the previous group.
  ZRT_CUDA(cudaStreamSynchronize(stream));
  uploader_->copy(parts);
  for (const Factors& factors : found)
    apply(*factors.deferred.place, factors.deferred.patch, factors.down, factors.up, device,
          reinterpret_cast<int*>(device), stream);
}

void Weights::defer_patches(const std::vector<WeightPatch>& patches, cudaStream_t stream,
                            bool add) {
  const std::size_t bytes = bytes_with(patches, add);
  std::vector<DeferredPatch> deferred;
  std::map<int, std::set<const Place*>> places;
  for (const WeightPatch& patch : patches) {
    const Place& place = place_of(patch);
    deferred.push_back(
        {.place = &place,
         .patch = patch,
         .down = patch.down == nullptr
                     ? std::vector<float>()
                     : std::vector<float>(patch.down, patch.down + down_count(patch)),
         .up = {patch.up, patch.up + up_count(patch)}});
    deferred.back().patch.down = deferred.back().patch.up = nullptr;  // the caller's
    places[place.group].insert(&place);
  }
  if (!deferred.empty()) {
    const DeviceBuffer memory(bytes, "the LoRAs");
    auto* const overflow = reinterpret_cast<int*>(memory.data());
    ZRT_CUDA(cudaMemsetAsync(overflow, 0, sizeof(int), stream));
    for (const auto& [group, patched] : places)
      load_group(group, {patched.begin(), patched.end()}, deferred, memory.data(), stream);
    check_range(overflow, stream);
  }
  if (add)
    for (DeferredPatch& earlier : deferred_) deferred.push_back(std::move(earlier));
  deferred_ = std::move(deferred);
  bytes_ = bytes;
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
                                           : device_.data() + place.device_offset;
  return {.data = data, .dtype = dtype, .shape = place.entry.shape};
}

Matrix Weights::matrix(const std::string& name, int in, int out) const {
  const auto found = entries_.find(name);
  const bool quantized = found != entries_.end() && is_8bit(found->second.entry.dtype);
  const TensorView view = get(name, {in, out}, quantized ? found->second.entry.dtype : storage_);
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
