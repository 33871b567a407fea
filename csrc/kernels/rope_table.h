#pragma once

#include <cuda_runtime_api.h>

namespace zimage_rt {

// Axes of a position: one of the sequence, two of the image (RopeEmbedder of diffusers 0.42.1).
constexpr int kRopeAxes = 3;

// Cosines and sines by position, fp32 [length, size], from the bundle: one pair of tables per axis.
// Null tables mean no rotation.
struct RopeAxis {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int length = 0;
  int size = 0;
};

// The angles of a sequence's rows, cos and sin fp32 [image_tokens + context_tokens, width]: image
// rows have the ids (context_tokens + 1, row, column), the pad rows after them are not rotated,
// context rows have (1 …, 0, 0). Source: ZImageTransformer2DModel.patchify_and_embed of diffusers
// 0.42.1.
struct RopeTable {
  RopeAxis axes[kRopeAxes];
  int grid_rows;
  int grid_columns;
  int image_tokens;  // with padding
  int context_tokens;
  float* cos;
  float* sin;
};
void rope_table(const RopeTable& args, cudaStream_t stream);

// The same for a plain sequence of positions 0 …: angle = position * inv_freq, [rows, size].
void position_table(const float* inv_freq, int size, int rows, float* cos, float* sin,
                    cudaStream_t stream);

}  // namespace zimage_rt
