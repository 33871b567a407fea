#pragma once

#include "kernels/conv2d.h"
#include "ops/ops.h"

namespace zimage_rt {

// A convolution by the kernel that is fastest here. Returns the number of parts of Conv2d::sums.
int convolution(const Conv2d& args, const Ops& ops);

}  // namespace zimage_rt
