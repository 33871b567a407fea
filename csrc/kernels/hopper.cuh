#pragma once

// PTX instructions of sm_90a: mbarriers, TMA loads, clusters and wgmma. PTX ISA 8.0, "mbarrier",
// "cp.async.bulk.tensor", "wgmma.mma_async".

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace zimage_rt {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ZRT_HOPPER 1
#else
#define ZRT_HOPPER 0
#endif

#if ZRT_HOPPER

__device__ inline void mbarrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised mbarriers visible to TMA and to the cluster.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and adds `bytes` to the transactions that the phase waits for.
__device__ inline void mbarrier_arrive_expect_tx(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the mbarrier at the same address in block `rank` of the cluster. It orders no ordinary
// writes: a release at cluster scope would cost a device-wide fence.
__device__ inline void mbarrier_arrive_remote(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of `parity` is complete.
__device__ inline void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}

__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Reads 16 bytes of the shared memory of block `rank` of the cluster, at an address of this block.
__device__ inline uint4 load_cluster_16(std::uint32_t address, std::uint32_t rank) {
  uint4 value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote];\n"
      "}"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

// TMA load of the box at (x, y, z) of a tensor to shared memory; elements outside of the tensor are
// zeros. The bytes complete on `barrier`. The multicast form writes to every block of the cluster
// in `mask`, and completes on the barrier of each.
__device__ inline void tma_load_3d(std::uint32_t to, const CUtensorMap* map, int x, int y, int z,
                                   std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void tma_load_3d_multicast(std::uint32_t to, const CUtensorMap* map, int x, int y,
                                             int z, std::uint32_t barrier, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(mask)
      : "memory");
}
__device__ inline void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads the line of an address to the L2 cache.
__device__ inline void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Synchronises `kThreads` threads, by default those of a warpgroup, on named barrier 1 to 15.
template <int kThreads = 128>
__device__ inline void named_barrier_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

__device__ inline void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ inline unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

template <int kRegisters>
__device__ inline void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The wgmma descriptor of a shared-memory matrix with rows of 128 bytes in the 128-byte swizzle.
// `leading`: bytes between boxes of 64 columns of an MN-major matrix (unused if K-major); `stride`:
// bytes between groups of eight rows.
__device__ inline std::uint64_t make_smem_descriptor(std::uint32_t address, std::uint32_t leading,
                                                     std::uint32_t stride) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | (std::uint64_t{stride >> 4} << 32) | (std::uint64_t{leading >> 4} << 16) |
         ((address & 0x3ffff) >> 4);
}

__device__ inline void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void warpgroup_commit_batch() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define ZRT_SUMS4(r, i) r(sums[i]), r(sums[i + 1]), r(sums[i + 2]), r(sums[i + 3])
#define ZRT_SUMS16(r, i) \
  ZRT_SUMS4(r, i), ZRT_SUMS4(r, i + 4), ZRT_SUMS4(r, i + 8), ZRT_SUMS4(r, i + 12)
#define ZRT_SUMS64(r, i) \
  ZRT_SUMS16(r, i), ZRT_SUMS16(r, i + 16), ZRT_SUMS16(r, i + 32), ZRT_SUMS16(r, i + 48)
// The registers of the sums [64, n] as operands of the instruction, by n.
#define ZRT_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ZRT_REGISTERS_64                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ZRT_REGISTERS_128                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ZRT_REGISTERS_256                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "   \
  "%124, %125, %126, %127"
#define ZRT_SUMS_32(r) ZRT_SUMS16(r, 0)
#define ZRT_SUMS_64(r) ZRT_SUMS16(r, 0), ZRT_SUMS16(r, 16)
#define ZRT_SUMS_128(r) ZRT_SUMS64(r, 0)
#define ZRT_SUMS_256(r) ZRT_SUMS64(r, 0), ZRT_SUMS64(r, 64)
// `a`, `b` and `add` are the operands after the n / 2 sums; `r` is the constraint of the sums, "+f"
// or "+r"; `flags` follow the predicate.
#define ZRT_WGMMA_OPERANDS_32 "%16, %17, p"
#define ZRT_WGMMA_OPERANDS_64 "%32, %33, p"
#define ZRT_WGMMA_OPERANDS_128 "%64, %65, p"
#define ZRT_WGMMA_OPERANDS_256 "%128, %129, p"
#define ZRT_WGMMA_ADD_32 "%18"
#define ZRT_WGMMA_ADD_64 "%34"
#define ZRT_WGMMA_ADD_128 "%66"
#define ZRT_WGMMA_ADD_256 "%130"
#define ZRT_WGMMA(n, k_and_types, r, flags)                                     \
  asm volatile(                                                                 \
      "{\n"                                                                     \
      ".reg .pred p;\n"                                                         \
      "setp.ne.b32 p, " ZRT_WGMMA_ADD_##n                                       \
      ", 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" #n k_and_types " {" ZRT_REGISTERS_##n \
      "}, " ZRT_WGMMA_OPERANDS_##n flags                                        \
      ";\n"                                                                     \
      "}"                                                                       \
      : ZRT_SUMS_##n(r)                                                         \
      : "l"(a), "l"(b), "r"(add))

// sums [64, 256] (+)= a [64, 16] · b [16, 256] by the four warps of a warpgroup; `add` 0
// overwrites. `a` is K-major; `b` is K-major if kBIsKMajor, else MN-major. With g = lane / 4 and t
// = lane % 4, warp w holds rows 16 w + g and 16 w + g + 8: sums[4 j] and sums[4 j + 1] are columns
// 8 j + 2 t and 8 j + 2 t + 1 of the first row, the next two those of the second.
template <bool kBIsKMajor>
__device__ inline void wgmma_m64n256k16(float (&sums)[128], std::uint64_t a, std::uint64_t b,
                                        int add, const __nv_bfloat16*) {
  if constexpr (kBIsKMajor)
    ZRT_WGMMA(256, "k16.f32.bf16.bf16", "+f", ", 1, 1, 0, 0");
  else
    ZRT_WGMMA(256, "k16.f32.bf16.bf16", "+f", ", 1, 1, 0, 1");
}
template <bool kBIsKMajor>
__device__ inline void wgmma_m64n256k16(float (&sums)[128], std::uint64_t a, std::uint64_t b,
                                        int add, const __half*) {
  if constexpr (kBIsKMajor)
    ZRT_WGMMA(256, "k16.f32.f16.f16", "+f", ", 1, 1, 0, 0");
  else
    ZRT_WGMMA(256, "k16.f32.f16.f16", "+f", ", 1, 1, 0, 1");
}

// sums [64, kN] (+)= a [64, 32] · b [32, kN] of 8-bit numbers, both K-major.
template <int kN>
__device__ inline void wgmma_k32(int (&sums)[kN / 2], std::uint64_t a, std::uint64_t b, int add,
                                 const std::int8_t*) {
  static_assert(kN == 32 || kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 32)
    ZRT_WGMMA(32, "k32.s32.s8.s8", "+r", "");
  else if constexpr (kN == 64)
    ZRT_WGMMA(64, "k32.s32.s8.s8", "+r", "");
  else if constexpr (kN == 128)
    ZRT_WGMMA(128, "k32.s32.s8.s8", "+r", "");
  else
    ZRT_WGMMA(256, "k32.s32.s8.s8", "+r", "");
}
template <int kN>
__device__ inline void wgmma_k32(float (&sums)[kN / 2], std::uint64_t a, std::uint64_t b, int add,
                                 const __nv_fp8_e4m3*) {
  static_assert(kN == 32 || kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 32)
    ZRT_WGMMA(32, "k32.f32.e4m3.e4m3", "+f", ", 1, 1");
  else if constexpr (kN == 64)
    ZRT_WGMMA(64, "k32.f32.e4m3.e4m3", "+f", ", 1, 1");
  else if constexpr (kN == 128)
    ZRT_WGMMA(128, "k32.f32.e4m3.e4m3", "+f", ", 1, 1");
  else
    ZRT_WGMMA(256, "k32.f32.e4m3.e4m3", "+f", ", 1, 1");
}

#undef ZRT_WGMMA
#undef ZRT_WGMMA_ADD_256
#undef ZRT_WGMMA_OPERANDS_256
#undef ZRT_SUMS_256
#undef ZRT_REGISTERS_256
#undef ZRT_WGMMA_ADD_128
#undef ZRT_WGMMA_OPERANDS_128
#undef ZRT_SUMS_128
#undef ZRT_REGISTERS_128
#undef ZRT_WGMMA_ADD_64
#undef ZRT_WGMMA_OPERANDS_64
#undef ZRT_SUMS_64
#undef ZRT_REGISTERS_64
#undef ZRT_WGMMA_ADD_32
#undef ZRT_WGMMA_OPERANDS_32
#undef ZRT_SUMS_32
#undef ZRT_REGISTERS_32
#undef ZRT_SUMS64
#undef ZRT_SUMS16
#undef ZRT_SUMS4

#endif  // ZRT_HOPPER

}  // namespace zimage_rt
