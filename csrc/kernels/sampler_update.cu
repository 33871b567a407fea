#include <cuda_runtime_api.h>

#include <cstddef>

#include "cpu/sampler.h"
#include "device/check.h"
#include "kernels/numeric.cuh"
#include "kernels/patch_index.cuh"
#include "kernels/sampler_update.h"

namespace zimage_rt {
namespace {

constexpr int kThreads = 256;

__device__ float guide(float positive, float negative, float scale) {
  return __fadd_rn(positive, __fmul_rn(scale, __fsub_rn(positive, negative)));
}

// a * x + b * y without contraction to an FMA, as in the loop on the CPU.
__device__ float combine(float a, float x, float b, float y) {
  return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y));
}

__global__ void sampler_update_kernel(SamplerUpdate args) {
  const int at = blockIdx.x * kThreads + threadIdx.x, values = args.grid.values();
  if (at >= values) return;
  const std::size_t base = static_cast<std::size_t>(blockIdx.y) * values;
  float pred = -args.patches[base + at];
  const float scale = args.guided ? args.scales[args.step * args.samples + blockIdx.y] : 0.0f;
  if (scale > 0.0f) {
    const float negative =
        -args.patches[static_cast<std::size_t>(args.samples) * values + base + at];
    pred = guide(pred, negative, scale);
    if (args.normalized) pred *= args.factors[blockIdx.y];
  }
  const SamplerStep step = args.steps[args.step];
  const int features = args.grid.features();
  const int inside = latent_index(args.grid, at / features, at % features);
  const std::size_t i = base + inside;
  const float before = args.latents[i];
  float after = combine(step.x, before, step.pred, pred);
  const std::size_t slot = static_cast<std::size_t>(args.samples) * values;
  for (int k = 0; k < SamplerStep::kHistory; ++k)
    if (step.history[k] != 0.0f)
      after = __fadd_rn(after, __fmul_rn(step.history[k], args.kept[k * slot + i]));
  if (step.noise != 0.0f) after = __fadd_rn(after, __fmul_rn(step.noise, args.step_noise[i]));
  if (step.keep_x != 0.0f || step.keep_pred != 0.0f)
    args.kept[static_cast<std::size_t>(step.slot) * slot + i] =
        combine(step.keep_x, before, step.keep_pred, pred);
  if (args.mask != nullptr && step.ends != 0.0f) {
    const int area = args.grid.height * args.grid.width;
    const float mask = args.mask[static_cast<std::size_t>(blockIdx.y) * area + inside % area];
    const float sigma = step.sigma_next;
    const float image = combine(sigma, args.noise[i], 1.0f - sigma, args.image[i]);
    after = combine(1.0f - mask, image, mask, after);
  }
  args.latents[i] = after;
}

// One block per sample, so that the order of the sums is always the same.
__global__ void guidance_factor_kernel(SamplerUpdate args) {
  __shared__ float scratch[2][32];
  const int values = args.grid.values();
  const std::size_t base = static_cast<std::size_t>(blockIdx.x) * values;
  const float* const positive = args.patches + base;
  const float* const negative = positive + static_cast<std::size_t>(args.samples) * values;
  const float scale = args.scales[args.step * args.samples + blockIdx.x];
  float before = 0.0f, after = 0.0f;
  for (int at = threadIdx.x; at < values; at += blockDim.x) {
    const float guided = guide(positive[at], negative[at], scale);
    before += positive[at] * positive[at];
    after += guided * guided;
  }
  const float norm_before = sqrtf(block_sum(before, scratch[0]));
  const float norm_after = sqrtf(block_sum(after, scratch[1]));
  const float limit = norm_before * *args.normalization;
  if (threadIdx.x == 0) args.factors[blockIdx.x] = norm_after > limit ? limit / norm_after : 1.0f;
}

}  // namespace

void sampler_update(const SamplerUpdate& args, cudaStream_t stream) {
  if (args.guided && args.normalized) {
    guidance_factor_kernel<<<args.samples, 1024, 0, stream>>>(args);
    ZRT_LAUNCHED();
  }
  const dim3 blocks(ceil_div(args.grid.values(), kThreads), args.samples);
  sampler_update_kernel<<<blocks, kThreads, 0, stream>>>(args);
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
