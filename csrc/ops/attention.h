#pragma once

#include "ops/attention_args.h"
#include "ops/ops.h"

namespace zimage_rt {

// Attention by cuDNN, or by our own kernel for short sequences and without cuDNN.
void attention(const AttentionArgs& args, const Ops& ops);

}  // namespace zimage_rt
