// The forward pass of FlashAttention-2 (Dao 2023): a block holds a tile of queries and iterates
// over the keys, 64 at a time. A warp keeps the running maximum, sum and output of 16 or 32 queries
// in registers, so that warps share only the tiles of K and V.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "kernels/early_start.cuh"
#include "kernels/flash_attention.h"
#include "kernels/numeric.cuh"
#include "kernels/tensor_core.cuh"

namespace zimage_rt {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeyTile = 64;
// Tiles K0, V0, K1, V1, … pass through a ring of three slots: one is read while two are loaded.
constexpr int kSlots = 3;
constexpr float kLog2E = 1.4426950408889634f;

// A tile in shared memory has rows of kHeadDim elements in chunks of 16 bytes. Chunk c of row r is
// stored at position c ^ (r % 8) of its row, so that neither ldmatrix, which reads eight rows at a
// time, nor the stores have bank conflicts.
template <int kHeadDim>
__device__ int swizzled(int row, int chunk) {
  return row * kHeadDim * 2 + ((chunk ^ (row % 8)) * 16);
}

template <typename T, int kHeadDim_, int kRowTiles_>
struct Tile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;  // groups of 16 queries per warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpRows;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kSlotBytes = kKeyTile * kRowBytes;
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes;
  // Reloading the queries for every tile of keys costs shared-memory bandwidth; keeping them costs
  // kRowTiles * kHeadDim / 4 registers, which the largest variant cannot spare.
  static constexpr bool kKeepQueries = kRowTiles * kHeadDim <= 128;
  // Blocks per multiprocessor, which bound the registers of a thread.
  static constexpr int kBlocks = kRowTiles == 2 ? 2 : 3;
};

// Starts the copy of kRows rows to a tile; rows from `rows` on become zeros.
template <typename Tile, int kRows, typename T>
__device__ void load_rows(std::uint32_t tile, const T* source, std::int64_t token_stride,
                          int rows) {
  constexpr int kPass = kThreads / Tile::kChunks;  // rows at once; a multiple of 8
  const int row = threadIdx.x / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
  const std::uint32_t to = tile + swizzled<Tile::kHeadDim>(row, chunk);
  const T* from = source + row * token_stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows; i += kPass)
    cp_async_16(to + i * Tile::kRowBytes, from + i * token_stride, row + i < rows);
}

template <typename Tile>
using QueryFragments = std::uint32_t[Tile::kRowTiles][4];
template <typename Tile>
using Scores = float[Tile::kRowTiles][kKeyTile / 8][4];
template <typename Tile>
using Outputs = float[Tile::kRowTiles][Tile::kHeadDim / 8][4];
// One value for each of the rows g and g + 8 that a thread holds of every group of 16.
template <typename Tile>
using RowValues = float[Tile::kRowTiles][2];

// The address `step` times 16 elements, two chunks each, further along a row. The swizzle permutes
// groups of eight chunks and rows are aligned to their size, so this is an exclusive or; beyond
// eight chunks it is an addition, which becomes an immediate offset.
__device__ std::uint32_t along_row(std::uint32_t address, int step) {
  return (address ^ (step % 4 * 32)) + step / 4 * 128;
}

template <typename Tile>
__device__ void load_queries(std::uint32_t lane_address, int step, QueryFragments<Tile>& q) {
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m)
    ldmatrix_x4(along_row(lane_address, step) + m * 16 * Tile::kRowBytes, q[m]);
}

// scores += q k^T over 16 of the head's dimensions.
template <typename Tile, typename T>
__device__ void add_scores(const QueryFragments<Tile>& q, std::uint32_t lane_address, int step,
                           Scores<Tile>& scores) {
#pragma unroll
  for (int n = 0; n < kKeyTile / 16; ++n) {
    std::uint32_t k[4];
    ldmatrix_x4(along_row(lane_address, step) + n * 16 * Tile::kRowBytes, k);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      mma_m16n8k16(scores[m][2 * n], q[m], k[0], k[1], static_cast<const T*>(nullptr));
      mma_m16n8k16(scores[m][2 * n + 1], q[m], k[2], k[3], static_cast<const T*>(nullptr));
    }
  }
}

// Sets the scores of keys past the end, and of keys after the query if causal, to -inf.
// `first_query` is the first row of the thread, `first_key` the first key of the tile.
template <typename Tile>
__device__ void mask_scores(Scores<Tile>& scores, int first_query, int first_key, int keys,
                            bool causal) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_query + m * 16 + half * 8;
      const int end = causal ? min(keys, row + 1) : keys;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (column + n * 8 + i >= end) scores[m][n][2 * half + i] = -INFINITY;
    }
}

__device__ float max_of_four_lanes(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ float sum_of_four_lanes(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Replaces scores by 2^(scale * score - maximum) and rescales sum and output to the new maximum.
// The first tile has a key for every row, so the maximum is finite from then on; before that it is
// -inf and the correction 0. `row_sum` covers the columns of this thread.
template <typename Tile>
__device__ void online_softmax(Scores<Tile>& scores, float scale, RowValues<Tile>& row_max,
                               RowValues<Tile>& row_sum, Outputs<Tile>& out) {
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n)
        tile_max = fmaxf(tile_max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      const float maximum = fmaxf(row_max[m][half], max_of_four_lanes(tile_max) * scale);
      const float correction = ex2_approx(row_max[m][half] - maximum);
      row_max[m][half] = maximum;

      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[m][n][2 * half + i];
          score = ex2_approx(fmaf(score, scale, -maximum));
          sum += score;
        }
      row_sum[m][half] = row_sum[m][half] * correction + sum;
#pragma unroll
      for (int n = 0; n < Tile::kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) out[m][n][2 * half + i] *= correction;
    }
}

// out += p v. The fragments of the scores, rounded to 16 bits, have the layout of A's fragments.
template <typename Tile, typename T>
__device__ void add_outputs(const Scores<Tile>& p, std::uint32_t lane_address, Outputs<Tile>& out) {
  constexpr const T* kFormat = nullptr;
#pragma unroll
  for (int s = 0; s < kKeyTile / 16; ++s) {
    std::uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&c)[4] = p[m][2 * s + i / 2];
        a[m][i] = pack(c[i % 2 * 2], c[i % 2 * 2 + 1], kFormat);
      }
#pragma unroll
    for (int n = 0; n < Tile::kHeadDim / 16; ++n) {
      std::uint32_t v[4];
      ldmatrix_x4_trans(along_row(lane_address, n) + s * 16 * Tile::kRowBytes, v);
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        mma_m16n8k16(out[m][2 * n], a[m], v[0], v[1], kFormat);
        mma_m16n8k16(out[m][2 * n + 1], a[m], v[2], v[3], kFormat);
      }
    }
  }
}

// Divides by the sums and stores a warp's rows. They are staged in the warp's own rows of the tile
// of queries, which are no longer needed, so that stores to global memory are 16 bytes wide.
template <typename Tile, typename T>
__device__ void store_outputs(const Outputs<Tile>& out, const RowValues<Tile>& row_sum,
                              char* warp_rows, T* target, std::int64_t token_stride, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0f / sum_of_four_lanes(row_sum[m][half]);
      const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < Tile::kHeadDim / 8; ++n)
        *reinterpret_cast<std::uint32_t*>(warp_rows + swizzled<Tile::kHeadDim>(row, n) +
                                          lane % 4 * 4) =
            pack(out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse,
                 static_cast<const T*>(nullptr));
    }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < Tile::kWarpRows * Tile::kChunks; i += 32) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (row < rows)
      *reinterpret_cast<Half8*>(target + row * token_stride + chunk * 8) =
          *reinterpret_cast<const Half8*>(warp_rows + swizzled<Tile::kHeadDim>(row, chunk));
  }
}

// One block: kQueries queries (x) of a head (y) of a sample (z).
template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    flash_attention_kernel(const FlashAttention args) {
  allow_early_start();
  wait_for_previous_kernel();
  extern __shared__ __align__(1024) char shared[];
  constexpr int kHeadDim = Tile::kHeadDim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // With a causal mask the last queries have the most keys, so their blocks start first.
  const int tile = args.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int head = blockIdx.y, kv_head = head / (args.heads / args.kv_heads);
  const std::int64_t sample = blockIdx.z;
  const int first_query = tile * Tile::kQueries, first_row = first_query + warp * Tile::kWarpRows;
  const int keys = args.causal ? min(args.keys, first_query + Tile::kQueries) : args.keys;
  const T* q = static_cast<const T*>(args.q.data) + sample * args.q.batch_stride +
               first_query * args.q.token_stride + head * kHeadDim;
  const T* k =
      static_cast<const T*>(args.k.data) + sample * args.k.batch_stride + kv_head * kHeadDim;
  const T* v =
      static_cast<const T*>(args.v.data) + sample * args.v.batch_stride + kv_head * kHeadDim;

  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t ring = q_tile + Tile::kQueryBytes;
  // The rows and chunks of the lanes follow the fragments of tensor_core.cuh: the four matrices are
  // numbered down the columns of A and of v, and along the rows of k, which are the columns of B.
  const int low = lane % 16, high = lane / 16, mid = lane / 8 % 2;
  const std::uint32_t q_lane =
      q_tile + warp * Tile::kWarpRows * Tile::kRowBytes + swizzled<kHeadDim>(low, high);
  const std::uint32_t k_lane = ring + swizzled<kHeadDim>(lane % 8 + high * 8, mid);
  const std::uint32_t v_lane = ring + swizzled<kHeadDim>(low, high);

  load_rows<Tile, Tile::kQueries>(q_tile, q, args.q.token_stride, args.queries - first_query);
  load_rows<Tile, kKeyTile>(ring, k, args.k.token_stride, keys);
  cp_async_commit();
  load_rows<Tile, kKeyTile>(ring + Tile::kSlotBytes, v, args.v.token_stride, keys);
  cp_async_commit();

  std::uint32_t kept_queries[Tile::kKeepQueries ? kHeadDim / 16 : 1][Tile::kRowTiles][4];
  Outputs<Tile> out = {};
  RowValues<Tile> row_max, row_sum;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
    row_max[m][0] = row_max[m][1] = -INFINITY;
    row_sum[m][0] = row_sum[m][1] = 0.0f;
  }
  const float scale = args.scale * kLog2E;
  int slot = 0;  // byte offset of the slot that is read next; the one before it is free
  const auto next_slot = [](int bytes) {
    return bytes == (kSlots - 1) * Tile::kSlotBytes ? 0 : bytes + Tile::kSlotBytes;
  };
  const auto free_slot = [](int bytes) {
    return bytes == 0 ? (kSlots - 1) * Tile::kSlotBytes : bytes - Tile::kSlotBytes;
  };

#pragma unroll 1
  for (int first_key = 0; first_key < keys; first_key += kKeyTile) {
    const int next_key = first_key + kKeyTile;
    // After the barrier all parts of this tile have arrived, and the previous tile was read.
    cp_async_wait<1>();
    __syncthreads();
    k += kKeyTile * args.k.token_stride;
    if (next_key < keys)
      load_rows<Tile, kKeyTile>(ring + free_slot(slot), k, args.k.token_stride, keys - next_key);
    cp_async_commit();  // empty at the end, to keep the count

    if constexpr (Tile::kKeepQueries) {
      if (first_key == 0) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step)
          load_queries<Tile>(q_lane, step, kept_queries[step]);
      }
    }
    Scores<Tile> scores = {};
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      if constexpr (Tile::kKeepQueries) {
        add_scores<Tile, T>(kept_queries[step], k_lane + slot, step, scores);
      } else {
        QueryFragments<Tile> queries;
        load_queries<Tile>(q_lane, step, queries);
        add_scores<Tile, T>(queries, k_lane + slot, step, scores);
      }
    }
    if (next_key > keys || (args.causal && next_key > first_row + 1))
      mask_scores<Tile>(scores, first_row + lane / 4, first_key, keys, args.causal);
    online_softmax<Tile>(scores, scale, row_max, row_sum, out);
    slot = next_slot(slot);

    cp_async_wait<1>();
    __syncthreads();
    v += kKeyTile * args.v.token_stride;
    if (next_key < keys)
      load_rows<Tile, kKeyTile>(ring + free_slot(slot), v, args.v.token_stride, keys - next_key);
    cp_async_commit();
    add_outputs<Tile, T>(scores, v_lane + slot, out);
    slot = next_slot(slot);
  }

  store_outputs<Tile, T>(out, row_sum, shared + warp * Tile::kWarpRows * Tile::kRowBytes,
                         static_cast<T*>(args.out.data) + sample * args.out.batch_stride +
                             first_row * args.out.token_stride + head * kHeadDim,
                         args.out.token_stride, args.queries - first_row);
}

template <typename T, int kHeadDim, int kRowTiles>
void launch(const FlashAttention& args, cudaStream_t stream) {
  using Shape = Tile<T, kHeadDim, kRowTiles>;
  const auto kernel = flash_attention_kernel<T, Shape>;
  ZRT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Shape::kSharedBytes));
  const dim3 grid(ceil_div(args.queries, Shape::kQueries), args.heads, args.batch);
  launch_early(kernel, grid, kThreads, Shape::kSharedBytes, 1, stream, args);
}

void require(bool condition, const std::string& wanted) {
  if (!condition) throw std::invalid_argument("flash attention: expected " + wanted);
}

template <typename Matrix>
void check_matrix(const Matrix& matrix, const std::string& name) {
  require(reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0 && matrix.data != nullptr,
          name + " at a multiple of 16 bytes");
  require(matrix.token_stride % 8 == 0 && matrix.batch_stride % 8 == 0,
          name + " with strides of a multiple of 8 elements");
}

void check(const FlashAttention& args) {
  require(args.dtype != DType::kFloat32, "fp16 or bf16, got fp32");
  require(args.head_dim == 64 || args.head_dim == 128,
          "head_dim 64 or 128, got " + std::to_string(args.head_dim));
  require(args.batch > 0 && args.batch < 65536 && args.heads > 0 && args.heads < 65536,
          "between 1 and 65535 samples and heads");
  require(args.queries > 0 && args.keys > 0, "at least one query and one key");
  require(args.kv_heads > 0 && args.heads % args.kv_heads == 0,
          "kv_heads to divide the " + std::to_string(args.heads) + " heads, got " +
              std::to_string(args.kv_heads));
  require(!args.causal || args.queries == args.keys, "as many keys as queries where causal");
  require(args.scale > 0.0f, "a positive scale");
  require(args.query_tile == 0 || args.query_tile == 64 || args.query_tile == 128,
          "query_tile 0, 64 or 128");
  check_matrix(args.q, "q");
  check_matrix(args.k, "k");
  check_matrix(args.v, "v");
  check_matrix(args.out, "out");
}

// A tile of 128 queries halves the loads of K and V from shared memory, which bound long sequences.
// Two such blocks share a multiprocessor. With fewer than three blocks per multiprocessor the tail
// is unbalanced, and the smaller tile is faster.
int choose_query_tile(const FlashAttention& args) {
  if (args.query_tile != 0) return args.query_tile;
  const std::int64_t blocks =
      static_cast<std::int64_t>(ceil_div(args.queries, 128)) * args.heads * args.batch;
  return blocks >= 3 * multiprocessors() ? 128 : 64;
}

template <typename T>
void launch_for(const FlashAttention& args, cudaStream_t stream) {
  const bool large = choose_query_tile(args) == 128;
  if (args.head_dim == 64)
    large ? launch<T, 64, 2>(args, stream) : launch<T, 64, 1>(args, stream);
  else
    large ? launch<T, 128, 2>(args, stream) : launch<T, 128, 1>(args, stream);
}

}  // namespace

void flash_attention(const FlashAttention& args, cudaStream_t stream) {
  check(args);
  for_half_type(args.dtype, [&](auto type) { launch_for<decltype(type)>(args, stream); });
}

}  // namespace zimage_rt
