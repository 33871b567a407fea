#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "device/arena.h"
#include "device/dtype.h"
#include "ops/attention.h"
#include "ops/cublaslt_gemm.h"

namespace zimage_rt {

// What every program runs on.
struct Ops {
  Gemm& gemm;
  Attention& attention;
  cudaStream_t stream;
  void* fused;  // the workspace of kernels/fused_gemm.h; null where that is not to be used
};

// The one block of the text encoder, the context refiner and the transformer: attention, then
// SwiGLU, each between a norm before and, for Z-Image's, a norm behind it.
struct BlockShape {
  int dim;
  int heads;
  int kv_heads;
  int head_dim;
  int hidden;
  float norm_eps;
  float qk_norm_eps;
  bool causal;
  DType type;
  // Powers of two that keep fp16 inside its range (export/precision.py). What follows a branch
  // undoes them: a norm behind it by its eps, a plain sum by a factor.
  float attention_scale;
  float gate_scale;
  float up_scale;

  int qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Matrices are [in, out] in the storage type, or [out, in] where they are turned; q_norm and k_norm
// may be null.
struct BlockWeights {
  const void* qkv;
  const float* q_norm;
  const float* k_norm;
  const void* out;
  const void* gate_up;
  const void* down;
  bool turned = false;
};

// What norms multiply with, fp32 [dim]; post_* null where the branch is added without a norm.
struct BlockVectors {
  const float* pre_attention;
  const float* post_attention = nullptr;
  const float* pre_ffn;
  const float* post_ffn = nullptr;
};

// Memory of a pass over `rows` rows; the residual stream x is the caller's.
struct BlockBuffers {
  BlockBuffers() = default;
  BlockBuffers(const BlockShape& shape, std::size_t rows, Arena& arena);

  void* normed;  // [rows, dim]: a branch's input, and the attention's output
  void* wide;    // [rows, max(qkv, 2 * hidden)]
  void* hidden;  // [rows, hidden]
  void* branch;  // [rows, dim]
};

// Sequences of one length that lie behind one another.
struct SequenceGroup {
  int first_row;
  int sequences;
  int tokens;
};

// Cosines and sines of the rows' positions, fp32 [rows, head_dim / 2].
struct RopeView {
  const float* cos;
  const float* sin;
};

// Runs x, fp32 [rows, dim], through blocks in place.
void run_blocks(const BlockShape& shape, const std::vector<BlockWeights>& blocks,
                const std::vector<BlockVectors>& vectors, float* x, int rows,
                const std::vector<SequenceGroup>& groups, const RopeView& rope,
                const BlockBuffers& buffers, const Ops& ops);

}  // namespace zimage_rt
