#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"

namespace zimage_rt {

// Latents, fp32 [samples, channels, height, width], as rows of patches. The features of a patch are
// ordered (row, column, channel); the patches of an image are in row-major order.
struct PatchGrid {
  int channels;
  int height;  // of the latents
  int width;
  int patch;
  constexpr int rows() const { return height / patch * (width / patch); }
  constexpr int features() const { return patch * patch * channels; }
  constexpr int values() const { return channels * height * width; }
};

// patches [samples, padded_tokens, features] in `type`; rows past the image are zero. Sample i
// reads latents i % latent_samples, so that both halves of a guided batch read the same latents.
void patchify(const float* latents, int latent_samples, const PatchGrid& grid, void* patches,
              DType type, int samples, int padded_tokens, cudaStream_t stream);

// noise_pred [samples, channels, height, width] = -patches, with patches fp32
// [samples, grid.rows(), features]: the checkpoint predicts the other sign.
void unpatchify(const float* patches, const PatchGrid& grid, float* noise_pred, int samples,
                cudaStream_t stream);

}  // namespace zimage_rt
