// The patches of a module's weights: in place on the device, or whenever streamed weights get
// there.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/low_rank.h"
#include "kernels/patch_8bit.h"
#include "weights/uploader.h"
#include "weights/weights.h"

namespace zimage_rt {

std::size_t WeightPatch::down_count() const {
  if (down == nullptr) return 0;
  return static_cast<std::size_t>(rank) * static_cast<std::size_t>(rows);
}

std::size_t WeightPatch::up_count() const {
  return static_cast<std::size_t>(down == nullptr ? rows : rank) *
         static_cast<std::size_t>(columns);
}

std::size_t Weights::bytes_with(const std::vector<WeightPatch>& patches, bool add) const {
  std::map<int, std::size_t> bytes;
  for (const auto& [number, group] : groups_) bytes[number] = group.bytes;
  for (const WeightPatch& patch : patches)
    bytes[place_of(patch).group] += (patch.down_count() + patch.up_count()) * sizeof(float);
  if (add)
    for (const DeferredPatch& deferred : deferred_)
      bytes[deferred.place->group] += (deferred.down.size() + deferred.up.size()) * sizeof(float);
  std::size_t largest = 0;
  for (const auto& [number, size] : bytes) largest = std::max(largest, size);
  return shared_bytes_ + largest;
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

std::size_t Weights::patch_bytes(const std::vector<WeightPatch>& patches) const {
  if (patches.empty()) return 0;
  std::size_t floats = 1;  // the overflow flag
  for (const WeightPatch& patch : patches) floats += patch.down_count() + patch.up_count();
  return floats * sizeof(float) + staging_bytes();
}

void Weights::patch(const std::vector<WeightPatch>& patches, cudaStream_t stream, bool add) {
  if (streams()) return defer_patches(patches, stream, add);
  std::size_t floats = 1;  // the overflow flag
  for (const WeightPatch& patch : patches) {
    place_of(patch);
    floats += patch.down_count() + patch.up_count();
  }
  DeviceBuffer factors(floats * sizeof(float), "the LoRAs");
  std::set<const Place*> restored;
  if (!add)
    for (const std::string& name : patched_) restored.insert(&entries_.at(name));
  std::set<std::string> patched;
  std::set<int> streamed;  // the streamed blocks that change
  const auto is_streamed = [&](const Place& place) {
    return place.block >= 0 && blocks_->is_streamed(place.block);
  };
  for (const WeightPatch& patch : patches) {
    patched.insert(patch.tensor);
    const Place& place = place_of(patch);
    if (is_8bit(place.entry.dtype)) patched.insert(patch.tensor + "_scale");
    if (is_streamed(place)) streamed.insert(place.block);
  }
  patched_.insert(patched.begin(), patched.end());

  std::optional<Uploader> own;
  std::vector<Uploader::Part> parts;
  for (const Place* const place : restored) {
    if (is_streamed(*place))
      streamed.insert(place->block);
    else
      parts.push_back(part(*place, memory_of(*place)));
  }
  copy(parts, own);

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
  std::vector<Change> changes;
  for (const WeightPatch& patch : patches) {
    const float* const down =
        patch.down == nullptr ? nullptr : upload_factor(patch.down, patch.down_count());
    const float* const up = upload_factor(patch.up, patch.up_count());
    changes.push_back({.place = place_of(patch), .patch = patch, .down = down, .up = up});
  }
  for (const Change& change : changes)
    if (!is_streamed(change.place))
      apply(change, memory_of(change.place), device_.data(), overflow, stream);
  for (const int block : streamed) change_streamed(block, restored, changes, own, overflow, stream);
  if (!add) patched_ = std::move(patched);
  check_range(overflow, stream);
}

// Changes matrices of a streamed block in its slot, and stores them in its page-locked memory.
void Weights::change_streamed(int block, const std::set<const Place*>& restored,
                              const std::vector<Change>& changes, std::optional<Uploader>& own,
                              int* overflow, cudaStream_t stream) const {
  blocks_->synchronize();
  std::byte* const slot = blocks_->device(block);
  std::byte* const host = blocks_->host(block);
  std::vector<Uploader::Part> parts;
  std::set<const Place*> places;
  for (const Place* const place : restored)
    if (place->block == block && places.insert(place).second) parts.push_back(part(*place, slot));
  for (const Change& change : changes)
    if (change.place.block == block && places.insert(&change.place).second)
      ZRT_CUDA(cudaMemcpyAsync(slot + change.place.device_offset, host + change.place.device_offset,
                               change.place.bytes, cudaMemcpyHostToDevice, stream));
  copy(parts, own);
  for (const Change& change : changes)
    if (change.place.block == block) apply(change, slot, device_.data(), overflow, stream);
  for (const Place* const place : places)
    ZRT_CUDA(cudaMemcpyAsync(host + place->device_offset, slot + place->device_offset, place->bytes,
                             cudaMemcpyDeviceToHost, stream));
  // The next block may use the same slot.
  ZRT_CUDA(cudaStreamSynchronize(stream));
}

void Weights::apply(const Change& change, std::byte* memory, std::byte* scales_memory,
                    int* overflow, cudaStream_t stream) const {
  const auto& [place, patch, down, up] = change;
  if (is_8bit(place.entry.dtype)) {
    const Place& scales = find(patch.tensor + "_scale", "");
    const auto first = static_cast<std::size_t>(patch.first_column);
    patch_8bit(
        {.matrix = memory + place.device_offset + first * static_cast<std::size_t>(patch.rows),
         .scales = reinterpret_cast<float*>(scales_memory + scales.device_offset) + first,
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
  args.matrix = memory + place.device_offset;
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
    apply({.place = *factors.deferred.place,
           .patch = factors.deferred.patch,
           .down = factors.down,
           .up = factors.up},
          device, device, reinterpret_cast<int*>(device), stream);
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
                     : std::vector<float>(patch.down, patch.down + patch.down_count()),
         .up = {patch.up, patch.up + patch.up_count()}});
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

}  // namespace zimage_rt
