#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/check.h"
#include "device/dtype.h"
#include "kernels/numeric.cuh"
#include "kernels/patch_index.cuh"
#include "kernels/patchify.h"

namespace zimage_rt {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void patchify_kernel(const float* latents, int latent_samples, PatchGrid grid,
                                T* patches, int padded_tokens) {
  const int features = grid.features();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= padded_tokens * features) return;
  const int row = at / features, sample = blockIdx.y;
  const float* const source =
      latents + static_cast<std::size_t>(sample % latent_samples) * grid.values();
  const float value = row < grid.rows() ? source[latent_index(grid, row, at % features)] : 0.0f;
  patches[static_cast<std::size_t>(sample) * padded_tokens * features + at] = T(value);
}

__global__ void unpatchify_kernel(const float* patches, PatchGrid grid, float* noise_pred) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= grid.values()) return;
  const std::size_t base = static_cast<std::size_t>(blockIdx.y) * grid.values();
  const int features = grid.features();
  noise_pred[base + latent_index(grid, at / features, at % features)] = -patches[base + at];
}

}  // namespace

void patchify(const float* latents, int latent_samples, const PatchGrid& grid, void* patches,
              DType type, int samples, int padded_tokens, cudaStream_t stream) {
  const dim3 blocks(ceil_div(padded_tokens * grid.features(), kThreads), samples);
  for_half_type(type, [&](auto tag) {
    using T = decltype(tag);
    patchify_kernel<T><<<blocks, kThreads, 0, stream>>>(latents, latent_samples, grid,
                                                        static_cast<T*>(patches), padded_tokens);
  });
  ZRT_LAUNCHED();
}

void unpatchify(const float* patches, const PatchGrid& grid, float* noise_pred, int samples,
                cudaStream_t stream) {
  const dim3 blocks(ceil_div(grid.values(), kThreads), samples);
  unpatchify_kernel<<<blocks, kThreads, 0, stream>>>(patches, grid, noise_pred);
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
