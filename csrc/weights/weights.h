#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "device/tensor_view.h"
#include "weights/streamed_blocks.h"
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

// A change of some columns of a stored matrix [rows, …], or of a vector, which has one row. Adds
// downᵀ @ up or, if `down` is null, `up` itself. Host memory.
struct WeightPatch {
  std::string tensor;
  std::int64_t first_column;
  int rank;
  int rows;
  int columns;
  const float* down;  // [rank, rows], or null
  const float* up;    // [rank, columns], or [rows, columns]

  // Floats of the two.
  std::size_t down_count() const;
  std::size_t up_count() const;
};

// A patched weight does not fit into the format of the weights.
struct RangeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A module's weights: the mapped file, and its tensors on the device. Either all tensors are
// resident, or they are streamed: one group of tensors is resident at a time, in one shared slot.
// Matrices of blocks may also be streamed while they are used: see StreamedBlocks.
class Weights {
 public:
  // Throws WeightError if the file is shorter than an entry says, if its 16-bit tensors are not all
  // fp16 or all bf16, or, unless `takes_fp32`, if it has none; std::runtime_error if it cannot be
  // mapped. 8-bit matrices have scales: `NAME_scale`, fp32 [out].
  Weights(const std::string& path, std::vector<WeightEntry> entries, bool takes_fp32 = false);
  // Says that 8-bit matrices of a multiple of kRotationColumns inputs are rotated, as
  // export/modeling/quantized.py stores them.
  void set_rotated() { rotated_ = true; }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  ~Weights();

  // Switches to streaming. `group_of` gives the group of each tensor; tensors of a negative group
  // are always resident. Call it before the first upload.
  void stream(const std::function<int(const std::string&)>& group_of);
  bool streams() const { return !groups_.empty(); }
  // Stores the selected matrices, [in, out] in the file, as [out, in] on the device: products of
  // that layout are faster at the power limit (benchmarks/LOG.md). Call it before the first upload;
  // not for streamed weights. Matrices of 8 bits always are, which their products need.
  void transpose_on_upload(const std::function<bool(const std::string&)>& selects);
  // Has matrices of blocks stored block by block, so that blocks can be streamed. `block_of` gives
  // the block of a tensor; those of a negative one are always resident. Call it before the first
  // upload; not for weights in groups.
  void split_blocks(const std::function<int(const std::string&)>& block_of);
  // The blocks, null without split_blocks(). Tensors of a streamed block are in its slot, and
  // addresses change whenever blocks move.
  StreamedBlocks* blocks() const { return blocks_.get(); }
  // Loads a group with its patches, in stream order. Until the next group is loaded, get() is valid
  // for its tensors and for no other group's. Uploaded weights only.
  void load_group(int group, cudaStream_t stream);

  // Allocates device memory and copies the tensors to it; of streamed weights, only those of no
  // group. Throws OutOfMemoryError and HostMemoryError. Addresses change with every upload.
  void upload(const std::string& purpose);
  // Sets the device's tensors to the file's plus these patches, in place. Tensors of earlier
  // patches that are not among these are restored to the byte; with `add`, earlier patches stay,
  // and the new ones share no columns with them. No two patches share columns. No kernel may be
  // running. Throws WeightError and OutOfMemoryError before anything changes, RangeError after it:
  // the caller then patches again with the previous patches. Streamed weights store the patches
  // until their groups are loaded, and need no upload before. All patches are tried at once in
  // separate memory, so after any error nothing has changed.
  void patch(const std::vector<WeightPatch>& patches, cudaStream_t stream, bool add = false);
  void release() { device_.release(); }
  bool uploaded() const { return device_.data() != nullptr; }
  // Device memory while uploaded.
  std::size_t bytes() const { return bytes_ + (blocks_ ? blocks_->device_bytes() : 0); }
  // Device memory that upload() and patch() need in addition while they run, for transpositions.
  std::size_t staging_bytes() const;
  // Device memory that patch() needs in addition while it runs, not of weights in groups. None
  // without patches: restoring the file's tensors is never refused.
  std::size_t patch_bytes(const std::vector<WeightPatch>& patches) const;
  // bytes() of weights in groups with these patches instead of the current ones, or, with `add`, in
  // addition to them. Throws WeightError.
  std::size_t bytes_with(const std::vector<WeightPatch>& patches, bool add = false) const;

  // The current address of a tensor: device memory, or the mapped file for host entries. `shape` is
  // the file's, even if the device stores the transpose. Throws WeightError if the tensor is
  // missing or has another shape or dtype.
  TensorView get(const std::string& name, std::initializer_list<std::int64_t> shape,
                 DType dtype) const;
  // A matrix in the format and layout that it has on the device, with its scales if it has 8 bits.
  // Throws WeightError.
  Matrix matrix(const std::string& name, int in, int out) const;
  // An fp32 vector. Throws WeightError.
  const float* vector(const std::string& name, std::int64_t size) const;
  // The size of one axis of a tensor of `rank` axes. Throws WeightError.
  int axis(const std::string& name, std::size_t rank, std::size_t index) const;
  // The rotation of an 8-bit matrix of so many inputs.
  Rotation rotation(std::int64_t in) const {
    return rotated_ && in % kRotationColumns == 0 ? Rotation::kConvRot : Rotation::kNone;
  }
  // The format of all matrices that do not have 8 bits: fp16 or bf16. Throws WeightError if there
  // is none, because all are fp32.
  DType storage() const;
  bool is_fp32() const { return storage_ == DType::kFloat32; }

 private:
  struct Place {
    WeightEntry entry;
    std::size_t bytes;
    std::size_t device_offset;
    int group = -1;  // none
    int block = -1;  // none: in device_
    Layout layout = Layout::kInOut;
  };
  // Tensors of streamed weights that are resident together, followed by the factors of their
  // patches.
  struct Group {
    std::vector<const Place*> places;
    std::size_t bytes = 0;
  };
  // A patch of streamed weights, which owns its factors.
  struct DeferredPatch {
    const Place* place;
    WeightPatch patch;  // without its factors
    std::vector<float> down;
    std::vector<float> up;
  };

  void check_storage(const WeightEntry& entry);
  const Place& find(const std::string& name, const std::string& shape) const;
  const Place& place_of(const WeightPatch& patch) const;
  Uploader::Part part(const Place& place, std::byte* device) const;
  void copy(const std::vector<Uploader::Part>& parts, std::optional<Uploader>& own) const;
  std::byte* memory_of(const Place& place) const;
  // A patch with its factors on the device.
  struct Change {
    const Place& place;
    const WeightPatch& patch;
    const float* down;
    const float* up;
  };
  void apply(const Change& change, std::byte* memory, std::byte* scales_memory, int* overflow,
             cudaStream_t stream) const;
  void change_streamed(int block, const std::set<const Place*>& restored,
                       const std::vector<Change>& changes, std::optional<Uploader>& own,
                       int* overflow, cudaStream_t stream) const;
  void check_range(const int* overflow, cudaStream_t stream) const;
  void defer_patches(const std::vector<WeightPatch>& patches, cudaStream_t stream, bool add);
  void load_group(int group, const std::vector<const Place*>& places,
                  const std::vector<DeferredPatch>& patches, std::byte* device,
                  cudaStream_t stream) const;

  std::string path_;
  std::unordered_map<std::string, Place> entries_;
  const std::byte* map_ = nullptr;
  std::size_t map_bytes_ = 0;
  std::size_t bytes_ = 0;
  DType storage_ = DType::kFloat32;  // until the first 16-bit tensor
  std::string storage_from_;         // the name of that tensor
  bool rotated_ = false;
  DeviceBuffer device_;
  std::set<std::string> patched_;  // since the last upload

  std::unique_ptr<StreamedBlocks> blocks_;

  std::map<int, Group> groups_;   // empty unless streamed
  std::size_t shared_bytes_ = 0;  // in front of every group
  std::vector<DeferredPatch> deferred_;
  std::unique_ptr<Uploader> uploader_;
};

}  // namespace zimage_rt
