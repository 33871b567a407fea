#pragma once

#include <cstddef>
#include <vector>

#include "device/arena.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "ops/ops.h"
#include "weights/streamed_blocks.h"

namespace zimage_rt {

// The block of the text encoder, the context refiner and the transformer: attention, then SwiGLU,
// each with a norm before it and, in Z-Image, another after it.
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
  // Powers of two that keep fp16 in range (export/precision.py). The end of a branch undoes them:
  // in the eps of its norm or, without a norm, by a factor.
  float attention_scale;
  float gate_scale;
  float up_scale;
  bool has_8bit = false;  // whether matrices may have 8 bits

  int qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// The 8-bit format of a module's blocks, from its config in the manifest.
struct Quantization {
  bool is_on = false;  // matrices may have 8 bits
  bool rotates = false;
};

struct BlockWeights {
  Matrix qkv;
  const float* q_norm;  // [head_dim]; null, like k_norm, without these norms
  const float* k_norm;
  Matrix out;
  Matrix gate_up;
  Matrix down;
};

// The factors of a block's norms, fp32 [dim]; post_* are null if the branch is added without a
// norm.
struct BlockModulation {
  const float* pre_attention;
  const float* post_attention = nullptr;
  const float* pre_ffn;
  const float* post_ffn = nullptr;
};

// Memory of a pass over `rows` rows; the residual stream x is the caller's.
struct BlockBuffers {
  BlockBuffers() = default;
  BlockBuffers(const BlockShape& shape, std::size_t rows, Arena& arena);

  void* normed;  // [rows, dim]: the input of a branch, and the output of the attention
  void* wide;    // [rows, max(qkv, 2 * hidden)]
  void* hidden;  // [rows, hidden]
  void* branch;  // [rows, dim]
  // The inputs of 8-bit matrices: [rows, max(dim, hidden)], and a scale per row.
  void* quantized = nullptr;
  float* quantized_scales = nullptr;
};

// Consecutive sequences of the same length.
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

// Rows that pass through blocks together: which attend to which, and their positions.
struct Sequences {
  int rows;
  std::vector<SequenceGroup> groups;
  RopeView rope;
};

// Matrices that are on the device only while their block is computed. `first` is the number of the
// first block of a run.
struct BlockStream {
  StreamedBlocks* blocks = nullptr;  // null: all are resident
  int first = 0;
};

// Runs x, fp32 [sequences.rows, dim], through blocks in place.
void run_blocks(const BlockShape& shape, const std::vector<BlockWeights>& blocks,
                const std::vector<BlockModulation>& modulations, float* x,
                const Sequences& sequences, const BlockBuffers& buffers, const Ops& ops,
                const BlockStream& streamed = {});

}  // namespace zimage_rt
