#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "zimage_rt/device.h"
#include "zimage_rt/tensor_view.h"

namespace zimage_rt {

// One tensor of a bundle's safetensors file.
struct WeightEntry {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::size_t offset;  // from the start of the file
  bool host = false;   // stays in the mapped file: a table of which few rows are read
};

// A change of some columns of a stored matrix [rows, …]: downᵀ @ up is added. Host memory.
struct LowRank {
  std::string tensor;
  std::int64_t first_column;
  int rank;
  int rows;
  int columns;
  const float* down;  // [rank, rows]
  const float* up;    // [rank, columns]
};

// The weights' format cannot hold what a change makes of them.
struct RangeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A module's weights: the mapped file, and a copy of it on the device.
class Weights {
 public:
  // Throws std::runtime_error if the file cannot be mapped or is shorter than an entry says.
  Weights(const std::string& path, std::vector<WeightEntry> entries);
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  ~Weights();

  // Copies everything to the device through page-locked buffers, several threads reading the file.
  // Throws OutOfMemoryError. Addresses change with every upload.
  void upload(const std::string& purpose);
  // Makes the device's tensors the file's plus these changes, where they lie; what an earlier call
  // changed and this one does not is the file's again, to the byte. No two changes share columns,
  // and no kernel may be running. Throws WeightError and OutOfMemoryError before anything changes,
  // RangeError after it: the caller then calls again with the changes that were there.
  void change(const std::vector<LowRank>& changes, cudaStream_t stream);
  void release() { device_.release(); }
  bool uploaded() const { return device_.data() != nullptr; }
  std::size_t bytes() const { return bytes_; }

  // The tensor where it lies now: on the device, or in the mapped file for host entries.
  // Throws WeightError if it is missing or has another shape or dtype.
  TensorView get(const std::string& name, std::initializer_list<std::int64_t> shape,
                 DType dtype) const;
  bool has(const std::string& name) const { return entries_.count(name) != 0; }
  // The format of the matrices: fp16 or bf16.
  DType storage() const { return storage_; }

 private:
  struct Place {
    WeightEntry entry;
    std::size_t bytes;
    std::size_t device_offset;
  };
  std::string path_;
  std::unordered_map<std::string, Place> entries_;
  const std::byte* map_ = nullptr;
  std::size_t map_bytes_ = 0;
  std::size_t bytes_ = 0;
  DType storage_ = DType::kFloat32;
  DeviceBuffer device_;
  std::set<std::string> changed_;  // since the last upload

  void copy(const std::vector<const Place*>& places, std::byte* device) const;
};

}  // namespace zimage_rt
