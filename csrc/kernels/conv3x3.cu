#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/check.h"
#include "kernels/conv3x3.h"
#include "kernels/conv3x3_kernel.cuh"

namespace zimage_rt {
namespace {

using namespace conv3x3_detail;

// Attributes of the current device.
struct Device {
  int index = 0, multiprocessors = 0, shared_bytes = 0;
  Device() {
    ZRT_CUDA(cudaGetDevice(&index));
    ZRT_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    ZRT_CUDA(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  }
};

template <typename C>
int tile_count(const Conv3x3& args) {
  return args.batch * ceil_div(args.out_height(), C::tile_height) *
         ceil_div(args.out_width(), C::tile_width);
}

template <typename C, typename T, Conv3x3Output kKind>
void launch(const Conv3x3& args, const Device& device, cudaStream_t stream) {
  const auto kernel = conv3x3_kernel<C, T, kKind>;
  // Function attributes are per device, so bit masks hold the devices for which they are set, and
  // those whose code contains the wait that an early start needs.
  static std::atomic<std::uint64_t> configured{0}, waits{0};
  const std::uint64_t bit = device.index < 64 ? std::uint64_t{1} << device.index : 0;
  if ((configured.load() & bit) == 0) {
    ZRT_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared_bytes));
    cudaFuncAttributes attributes;
    ZRT_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    if (attributes.ptxVersion >= 90) waits.fetch_or(bit);
    configured.fetch_or(bit);
  }
  Params params{};
  params.input = args.input;
  params.packed = static_cast<const uint4*>(args.packed);
  params.residual = args.residual;
  params.output = args.output;
  params.upsample = args.upsample ? 1 : 0;
  params.height = args.height << params.upsample;
  params.width = args.width << params.upsample;
  params.out_height = args.out_height();
  params.out_width = args.out_width();
  params.out_channels = args.out_channels;
  params.tiles_x = ceil_div(params.out_width, C::tile_width);
  params.tiles_y = ceil_div(params.out_height, C::tile_height);
  params.tiles = tile_count<C>(args);
  params.relu = args.relu;
  params.scale = args.scale;
  params.shift = args.shift;
  params.not_finite = args.not_finite;

  // As many blocks as are resident at once: they iterate over the tiles, so that weights are read
  // once per block. The system reserves 1 KB of shared memory per block.
  const int resident = std::max(1, (device.shared_bytes + 1024) / (C::shared_bytes + 1024));
  constexpr int kChannelBlocks =
      kKind == Conv3x3Output::kHalf ? kWideChannels / C::block_channels : 1;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(params.tiles, device.multiprocessors * resident), kChannelBlocks);
  config.blockDim = dim3(C::threads);
  config.dynamicSmemBytes = C::shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = args.early_start && (waits.load() & bit) != 0 ? 1 : 0;
  ZRT_CUDA(cudaLaunchKernelEx(&config, kernel, params));
  ZRT_LAUNCHED();
}

//                      in  block warp  tile    rows stages stride
using Body = TileConfig<64, 64, 64, 16, 32, 4, 2, 1>;    // 225 KB of shared memory: Hopper
using Medium = TileConfig<64, 64, 64, 16, 16, 4, 2, 1>;  // 154 KB: sm_80
using Small =
    TileConfig<64, 64, 32, 8, 16, 4, 1, 1>;  // 95 KB: other devices, and images of few tiles
using Halving = TileConfig<64, 32, 32, 4, 16, 2, 1, 2>;  // 74 KB
using First = TileConfig<16, 64, 32, 8, 16, 4, 1, 1>;
using Last8 = TileConfig<64, 16, 8, 16, 16, 2, 1, 1>;  // 51 KB
using Last16 = TileConfig<64, 16, 16, 16, 16, 2, 1, 1>;

template <typename T>
void dispatch_half(const Conv3x3& args, cudaStream_t stream) {
  constexpr auto kHalf = Conv3x3Output::kHalf;
  const Device device;
  if (args.in_channels <= kNarrowChannels) return launch<First, T, kHalf>(args, device, stream);
  if (args.stride == 2) return launch<Halving, T, kHalf>(args, device, stream);
  // Large tiles halve the copies, but there must be enough of them to fill the device.
  const int enough = device.multiprocessors * 3 / 4;
  if (device.shared_bytes >= Body::shared_bytes && tile_count<Body>(args) >= enough)
    return launch<Body, T, kHalf>(args, device, stream);
  if (device.shared_bytes >= Medium::shared_bytes && device.shared_bytes < Body::shared_bytes &&
      tile_count<Medium>(args) >= enough)
    return launch<Medium, T, kHalf>(args, device, stream);
  launch<Small, T, kHalf>(args, device, stream);
}

template <typename T>
void dispatch_narrow(const Conv3x3& args, cudaStream_t stream) {
  const Device device;
  if (args.kind == Conv3x3Output::kUint8)
    launch<Last8, T, Conv3x3Output::kUint8>(args, device, stream);
  else if (args.out_channels <= 8)
    launch<Last8, T, Conv3x3Output::kFloat>(args, device, stream);
  else
    launch<Last16, T, Conv3x3Output::kFloat>(args, device, stream);
}

void check(const Conv3x3& args) {
  const bool half = args.kind == Conv3x3Output::kHalf;
  const bool wide_in = args.in_channels == kWideChannels;
  const int most = args.kind == Conv3x3Output::kUint8 ? 8 : kNarrowChannels;
  const bool channels =
      half ? args.out_channels == kWideChannels &&
                 (wide_in || (args.in_channels >= 1 && args.in_channels <= kNarrowChannels))
           : wide_in && args.out_channels >= 1 && args.out_channels <= most;
  const bool stride = args.stride == 1 || (args.stride == 2 && half && wide_in && !args.upsample);
  const bool residual = half || (args.residual == nullptr && !args.relu);
  if (!channels || !stride || !residual || args.height < 0 || args.width < 0 || args.batch < 0)
    throw std::invalid_argument("conv3x3: no kernel for " + std::to_string(args.in_channels) +
                                " -> " + std::to_string(args.out_channels) + " channels, stride " +
                                std::to_string(args.stride) +
                                (half ? "" : ", output as planes or bytes"));
}

// One thread per 32-bit word of the packed weights.
template <typename T>
__global__ void pack_kernel(const T* weight, const T* bias, int in_channels, int out_channels,
                            int steps, int pairs, std::uint32_t* packed) {
  const int word = blockIdx.x * blockDim.x + threadIdx.x;
  const int words = 9 * steps * pairs * 128;
  if (word >= words) {
    const int channel = word - words;
    if (channel < kWideChannels) {
      const bool inside = bias != nullptr && channel < out_channels;
      reinterpret_cast<float*>(packed)[word] = inside ? static_cast<float>(bias[channel]) : 0.0f;
    }
    return;
  }
  const int register_index = word % 4, lane = word / 4 % 32, pair = word / 128 % pairs;
  const int dy = word / (128 * pairs) % 3, step = word / (128 * pairs * 3) % steps;
  const int dx = word / (128 * pairs * 3 * steps);
  const int tile = pair * 2 + register_index / 2;
  const int out = output_channel(out_channels == kWideChannels, tile, lane / 4);
  const int in = step * 16 + register_index % 2 * 8 + lane % 4 * 2;
  float values[2];
  for (int i = 0; i < 2; ++i) {
    const bool inside = out < out_channels && in + i < in_channels;
    const std::int64_t source = ((out * in_channels + in + i) * 3 + dy) * 3 + dx;
    values[i] = inside ? static_cast<float>(weight[source]) : 0.0f;
  }
  packed[word] = pack(values[0], values[1], static_cast<const T*>(nullptr));
}

}  // namespace

void conv3x3(const Conv3x3& args, cudaStream_t stream) {
  check(args);
  if (args.batch == 0 || args.height == 0 || args.width == 0) return;
  for_half_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.kind == Conv3x3Output::kHalf)
      dispatch_half<T>(args, stream);
    else
      dispatch_narrow<T>(args, stream);
  });
}

std::size_t conv3x3_packed_bytes(int in_channels, int out_channels) {
  return 9 * static_cast<std::size_t>(padded(in_channels)) * padded(out_channels) * 2 + kBiasBytes;
}

void conv3x3_pack(const void* weight, const void* bias, DType dtype, int in_channels,
                  int out_channels, void* packed, cudaStream_t stream) {
  const auto words = static_cast<unsigned>(conv3x3_packed_bytes(in_channels, out_channels) / 4);
  for_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    pack_kernel<T><<<(words + 255) / 256, 256, 0, stream>>>(
        static_cast<const T*>(weight), static_cast<const T*>(bias), in_channels, out_channels,
        padded(in_channels) / 16, padded(out_channels) / 16, static_cast<std::uint32_t*>(packed));
    ZRT_LAUNCHED();
  });
}

}  // namespace zimage_rt
