#pragma once

#include "kernels/patchify.h"

namespace zimage_rt {

// The index of feature `feature` of patch `row` in the latents of one sample.
__device__ inline int latent_index(const PatchGrid& grid, int row, int feature) {
  const int columns = grid.width / grid.patch;
  const int channel = feature % grid.channels, inside = feature / grid.channels;
  const int y = row / columns * grid.patch + inside / grid.patch;
  const int x = row % columns * grid.patch + inside % grid.patch;
  return (channel * grid.height + y) * grid.width + x;
}

}  // namespace zimage_rt
