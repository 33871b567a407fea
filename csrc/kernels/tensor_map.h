#pragma once

#include <cuda.h>

#include "device/dtype.h"

namespace zimage_rt {

constexpr int kTensorMapRowBytes = 128;  // of a box: the widest swizzle

// The TMA descriptor of a row-major matrix. A load copies `box_rows` rows of `boxes` neighbouring
// strips of 128 bytes, which are consecutive in shared memory.
CUtensorMap tensor_map(const void* data, DType type, int rows, int columns, int box_rows,
                       int boxes);

}  // namespace zimage_rt
