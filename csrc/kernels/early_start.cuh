#pragma once

// Programmatic dependent launch of Hopper and later (CUDA C++ Programming Guide, "Programmatic
// Dependent Launch and Synchronization"): a kernel starts while the previous one drains, and loads
// what that one does not write. On other devices all of this does nothing.

#include <cuda_runtime.h>

#include <cstddef>

#include "device/check.h"
#include "kernels/early_start.h"

namespace zimage_rt {

// Lets a kernel of launch_early() start once all blocks have called this or ended.
__device__ inline void allow_early_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the previous kernel is complete, with its writes visible.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel whose threads all call wait_for_previous_kernel() before they read or write
// what other kernels do; it starts early where it can. `cluster`: the blocks of a cluster along z.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 blocks, int threads, std::size_t shared_bytes,
                  unsigned cluster, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {.x = 1, .y = 1, .z = cluster};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !early_start_runs_here() ? 0 : cluster == 1 ? 1 : 2;
  ZRT_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  ZRT_LAUNCHED();
}

}  // namespace zimage_rt
