#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"

namespace zimage_rt {

// The widest timestep embedding that the kernels of a modulation take.
constexpr int kMaxModulationWidth = 256;

// The timestep's modulation of the transformer, for all steps of a loop at once, before it begins.

// out fp32 [steps, width] = linear2(silu(linear1(features(timestep * t_scale)))), in which features
// are the cosines, then the sines, of the timestep times `frequencies` [half]. Weights are [in,
// out] in `type`, everything else fp32; the sums are fp32.
struct TimestepEmbedding {
  const float* timesteps;  // [steps], = 1 - sigma
  float t_scale;
  const float* frequencies;
  int half;
  const void* weight1;  // [2 * half, middle]
  const float* bias1;
  int middle;           // at most 1024
  const void* weight2;  // [middle, width]
  const float* bias2;
  int width;
  DType type;
  float* out;
  int steps;
};
void timestep_embedding(const TimestepEmbedding& args, cudaStream_t stream);

// One modulated block: the adaLN weights, and the four norms that the vectors are folded into.
struct ModulatedBlock {
  const void* weight;  // [width, 4 * dim]: scale_msa, gate_msa, scale_mlp, gate_mlp
  const float* bias;
  const float* norms[4];  // attention_norm1, attention_norm2, ffn_norm1, ffn_norm2, each [dim]
};

// vectors fp32 [steps, blocks, 4, dim]:
//   attention_norm1 * (1 + scale_msa), attention_norm2 * tanh(gate_msa),
//   ffn_norm1 * (1 + scale_mlp), ffn_norm2 * tanh(gate_mlp).
struct Modulation {
  const float* embedding;        // [steps, width] from timestep_embedding
  const ModulatedBlock* blocks;  // on the device
  int block_count;
  int width;  // at most kMaxModulationWidth
  int dim;    // a multiple of 8
  DType type;
  float* vectors;
  int steps;
};
void modulation(const Modulation& args, cudaStream_t stream);

// scales fp32 [steps, dim] = 1 + linear(silu(embedding)): the modulation of the final layer.
struct FinalModulation {
  const float* embedding;
  const void* weight;  // [width, dim]
  const float* bias;
  int width;
  int dim;
  DType type;
  float* scales;
  int steps;
};
void final_modulation(const FinalModulation& args, cudaStream_t stream);

}  // namespace zimage_rt
