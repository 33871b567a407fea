#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

// Norms of a residual stream x, fp32 [rows, dim], in one pass over memory each. dim is a multiple
// of 8, at most 4096. Vectors (`weight`, `post`, `pre`, `scale`) are fp32 [dim]. If `quantized` has
// memory, the output is written there, from fp32, and `out` is not used; dim is then a multiple of
// 16, with a rotation of 256.

// out = x / sqrt(mean(x^2) + eps) * weight, in `type`.
struct RmsNorm {
  const float* x;
  const float* weight;
  void* out;
  DType type;
  int rows;
  int dim;
  float eps;
  QuantizedRows quantized = {};
};
void rms_norm(const RmsNorm& args, cudaStream_t stream);

// x += rms(branch) * post, then out = rms(x) * pre: the end of one branch of a block and the start
// of the next. If `post` is null the branch is added times branch_scale, without a norm; if `pre`
// is null nothing is written to out.
struct ResidualNorm {
  float* x;
  const void* branch;  // [rows, dim] in `type`
  const float* post;
  float post_eps;
  float branch_scale;
  const float* pre;
  float pre_eps;
  void* out;  // [rows, dim] in `type`
  DType type;
  int rows;
  int dim;
  QuantizedRows quantized = {};
};
void residual_norm(const ResidualNorm& args, cudaStream_t stream);

// out = (x - mean) / sqrt(var + eps) * scale, in `type`: the final layer's norm, which has no
// weights of its own.
struct LayerNorm {
  const float* x;
  const float* scale;
  void* out;
  DType type;
  int rows;
  int dim;
  float eps;
};
void layer_norm(const LayerNorm& args, cudaStream_t stream);

}  // namespace zimage_rt
