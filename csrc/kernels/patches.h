#pragma once

#include <cuda_runtime_api.h>

#include "cpu/sampler.h"
#include "device/dtype.h"

namespace zimage_rt {

// Between latents, fp32 [samples, channels, height, width], and rows of patches. A patch's features
// are ordered (row, column, channel); patches of an image go row by row.
struct PatchGrid {
  int channels;
  int height;  // of the latents
  int width;
  int patch;
  constexpr int rows() const { return height / patch * (width / patch); }
  constexpr int features() const { return patch * patch * channels; }
  constexpr int values() const { return channels * height * width; }
};

// patches [samples, padded_rows, features] in `type`; rows past the image are zero. Sample i reads
// latents i % latent_samples, so that both halves of a guided batch see the same latents.
void patchify(const float* latents, int latent_samples, const PatchGrid& grid, void* patches,
              DType type, int samples, int padded_rows, cudaStream_t stream);

// noise_pred [samples, channels, height, width] = -patches, with patches fp32
// [samples, grid.rows(), features]: the checkpoint predicts the other sign.
void unpatchify(const float* patches, const PatchGrid& grid, float* noise_pred, int samples,
                cudaStream_t stream);

// The linear update behind an evaluation (cpu/sampler.h), on the patches of its prediction,
// with guidance where `guided`:
//   pred = positive + scale * (positive - negative), the negative predictions in the second half,
// where the sample's scale is not 0,
// then, with normalization > 0, scaled down to at most normalization times the positive's norm.
// The formulas and their order are those of cpu/sampler.cc and cpu/guidance.cc. The table
// and the settings of the guidance lie on the device, so that a captured update serves any.
struct SamplerUpdate {
  const float* patches;
  PatchGrid grid;
  float* latents;
  float* kept;  // SamplerStep::kHistory arrays like the latents
  int samples;  // of the latents; the patches have twice as many where guided
  bool guided;
  bool normalized;
  const SamplerStep* steps;
  int step;
  const float* scales;  // of guidance, [steps, samples]
  const float* normalization;
  float* factors;           // [samples], scratch for normalization
  const float* step_noise;  // like latents; read where the row takes noise
  // Of an inpainting; mask [samples, 1, height, width] may be null.
  const float* mask;
  const float* image;
  const float* noise;
};
void sampler_update(const SamplerUpdate& args, cudaStream_t stream);

// rows [first, first + count) of every `stride` rows of x, fp32 [.., dim], become `row` [dim].
void fill_rows(float* x, const float* row, int samples, int stride, int first, int count, int dim,
               cudaStream_t stream);

}  // namespace zimage_rt
