#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/device.h"
#include "device/dtype.h"
#include "device/tensor_view.h"
#include "weights/uploader.h"

namespace zimage_rt {

// One tensor of a bundle's safetensors file.
struct WeightEntry {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::size_t offset;  // from the start of the file
  bool host = false;   // stays in the mapped file: a table of which few rows are read
};

// A change of some columns of a stored matrix [rows, …], or of a vector, which has one row: downᵀ @
// up is added, or, without a down, up itself. Host memory.
struct LowRank {
  std::string tensor;
  std::int64_t first_column;
  int rank;
  int rows;
  int columns;
  const float* down;  // [rank, rows], or null
  const float* up;    // [rank, columns], or [rows, columns]
};

// The weights' format cannot hold what a change makes of them.
struct RangeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A module's weights: the mapped file, and a copy of it on the device, whole or, streamed, one
// group of tensors after another.
class Weights {
 public:
  // Throws WeightError if the file is shorter than an entry says, or if its tensors of 16 bits are
  // not all fp16 or all bf16; std::runtime_error if it cannot be mapped.
  Weights(const std::string& path, std::vector<WeightEntry> entries);
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  ~Weights();

  // From now on the device holds one group of tensors at a time, each where the last one lay, and
  // with it those of no group (a negative number). Before anything is uploaded.
  void stream(const std::function<int(const std::string&)>& group_of);
  bool streams() const { return !groups_.empty(); }
  // From now on the device holds these matrices, [in, out] in the file, as [out, in]: what products
  // are faster with at the power limit (benchmarks/LOG.md). Before anything is uploaded; not of
  // streamed weights.
  void turn(const std::function<bool(const std::string&)>& which);
  bool turned(const std::string& name) const;
  // Brings a group, with its changes, when what the stream does is done: until the next group comes
  // its tensors are what get() says, and no other group's. Uploaded weights alone.
  void bring(int group, cudaStream_t stream);

  // Copies everything to the device through page-locked buffers, several threads reading the file;
  // streamed, only the tensors of no group, and takes the memory that the others need. Throws
  // OutOfMemoryError. Addresses change with every upload.
  void upload(const std::string& purpose);
  // Makes the device's tensors the file's plus these changes, where they lie; what an earlier call
  // changed and this one does not is the file's again, to the byte. No two changes share columns,
  // and no kernel may be running. Throws WeightError and OutOfMemoryError before anything changes,
  // RangeError after it: the caller then calls again with the changes that were there.
  // Streamed weights, which are not uploaded then, remember the changes for when their groups come.
  // All are tried at once, in memory of their own, so whatever this throws, nothing has changed.
  // With `add`, what earlier calls changed stays changed, and no change may share columns with it.
  void change(const std::vector<LowRank>& changes, cudaStream_t stream, bool add = false);
  void release() { device_.release(); }
  bool uploaded() const { return device_.data() != nullptr; }
  // Of the device's memory, while uploaded.
  std::size_t bytes() const { return bytes_; }
  // What upload() and change() take beside it for as long as they run, for matrices to be turned.
  std::size_t staging_bytes() const;
  // The same for streamed weights with these changes instead of theirs, or, with `add`, beside
  // them. Throws WeightError.
  std::size_t bytes_with(const std::vector<LowRank>& changes, bool add = false) const;

  // The tensor where it lies now: on the device, or in the mapped file for host entries. `shape` is
  // the file's, also where the device holds it turned.
  // Throws WeightError if it is missing or has another shape or dtype.
  TensorView get(const std::string& name, std::initializer_list<std::int64_t> shape,
                 DType dtype) const;
  // The format of all matrices: fp16 or bf16.
  DType storage() const { return storage_; }

 private:
  struct Place {
    WeightEntry entry;
    std::size_t bytes;
    std::size_t device_offset;
    int group = -1;  // none
    bool turned = false;
  };
  // Of streamed weights: tensors that are on the device together. Behind them lie the factors of
  // their changes.
  struct Group {
    std::vector<const Place*> places;
    std::size_t bytes = 0;
  };
  // A change that streamed weights remember, with factors of its own.
  struct Kept {
    const Place* place;
    LowRank change;  // without its factors
    std::vector<float> down;
    std::vector<float> up;
  };

  void check_storage(const WeightEntry& entry);
  const Place& place_of(const LowRank& change) const;
  Uploader::Part part(const Place& place, std::byte* device) const;
  void copy(const std::vector<const Place*>& places, std::byte* device) const;
  void update(const Place& place, const LowRank& change, const float* down, const float* up,
              std::byte* device, int* overflow, cudaStream_t stream) const;
  void check_range(const int* overflow, cudaStream_t stream) const;
  void keep(const std::vector<LowRank>& changes, cudaStream_t stream, bool add);
  void bring(int group, const std::vector<const Place*>& places, const std::vector<Kept>& changes,
             std::byte* device, cudaStream_t stream) const;

  std::string path_;
  std::unordered_map<std::string, Place> entries_;
  const std::byte* map_ = nullptr;
  std::size_t map_bytes_ = 0;
  std::size_t bytes_ = 0;
  DType storage_ = DType::kFloat32;  // no tensor of 16 bits was seen yet
  std::string storage_from_;         // the first one
  DeviceBuffer device_;
  std::set<std::string> changed_;  // since the last upload

  std::map<int, Group> groups_;   // none: all tensors are on the device together
  std::size_t shared_bytes_ = 0;  // in front of every group
  std::vector<Kept> kept_;
  std::unique_ptr<Uploader> uploader_;
};

}  // namespace zimage_rt
