#include "ops/attention.h"

#include <cmath>

#include "kernels/flash_attention.h"
#include "ops/cudnn_attention.h"

namespace zimage_rt {
namespace {

// Below this our own kernel is as fast, and needs no plan for each new prompt length.
constexpr int kCudnnTokens = 1024;

}  // namespace

void attention(const AttentionArgs& args, const Ops& ops) {
  if (ops.cudnn != nullptr && args.tokens >= kCudnnTokens) {
    ops.cudnn->run(args, ops.stream);
    return;
  }
  const auto input = [&](const void* data) -> FlashAttention::Input {
    return {.data = data, .token_stride = args.token_stride, .batch_stride = args.batch_stride};
  };
  flash_attention({.q = input(args.q),
                   .k = input(args.k),
                   .v = input(args.v),
                   .out = {.data = args.out,
                           .token_stride = args.out_token_stride,
                           .batch_stride = args.out_batch_stride},
                   .batch = args.batch,
                   .queries = args.tokens,
                   .keys = args.tokens,
                   .heads = args.heads,
                   .kv_heads = args.kv_heads,
                   .head_dim = args.head_dim,
                   .scale = 1.0f / std::sqrt(static_cast<float>(args.head_dim)),
                   .causal = args.causal,
                   .dtype = args.type},
                  ops.stream);
}

}  // namespace zimage_rt
