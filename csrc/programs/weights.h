#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
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
};

}  // namespace zimage_rt
