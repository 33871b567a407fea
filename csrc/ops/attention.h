#pragma once

#include "ops/attention_args.h"
#include "ops/ops.h"

namespace zimage_rt {

// Attention by cuDNN, or by our own kernel for short sequences and where cuDNN is not used.
void attention(const AttentionArgs& args, const Ops& ops);

}  // namespace zimage_rt
