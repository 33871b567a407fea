#include "ops/convolution.h"

#include "kernels/conv2d.h"
#include "ops/ops.h"

namespace zimage_rt {

int convolution(const Conv2d& args, const Ops& ops) {
  if (ops.fused_workspace == nullptr) return conv2d_mma(args, ops.stream);
  Conv2d with_workspace = args;
  with_workspace.workspace = ops.fused_workspace;
  return conv2d_hopper(with_workspace, ops.stream);
}

}  // namespace zimage_rt
