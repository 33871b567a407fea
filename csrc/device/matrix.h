#pragma once

#include "device/dtype.h"

namespace zimage_rt {

// How a weight matrix is stored, row-major: [in, out] or [out, in].
enum class Layout { kInOut, kOutIn };

}  // namespace zimage_rt
