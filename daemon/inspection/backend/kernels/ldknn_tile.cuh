// What the searches of ldknn.cu and ldknn_int8.cu share: the product of a block's queries with its slice of the bank,
// tile by tile. Axes: M queries, Np rows of the bank (padded to BN); a row of either is `row_bytes` long, a multiple of
// 64, in FP16 or INT8. Grid (ceil(M / BM), splits), 256 threads, STAGES * (BM + BN) * 64 bytes of dynamic shared memory.
#pragma once
#include "primitives.cuh"

#ifndef BM
#define BM 128  // queries of a block
#endif
#ifndef BN
#define BN 128  // rows of the bank at a time
#endif
#ifndef STAGES
#define STAGES 3  // copies on their way
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32;  // of a warp's share of the BM x BN tile
constexpr int kWarpsAcross = BN / kWarpColumns;
constexpr int kTilesDown = kWarpRows / 16, kTilesAcross = kWarpColumns / 8;
constexpr int kOwnRows = 2 * kTilesDown, kOwnColumns = 2 * kTilesAcross;  // of a thread
constexpr int kStepBytes = 64, kChunks = 4;  // of a row at a time: 32 channels in FP16, 64 in INT8; chunks of 16 bytes
constexpr int kStageBytes = (BM + BN) * kStepBytes;
static_assert((BM / kWarpRows) * kWarpsAcross * 32 == kThreads, "the warps must cover the tile");

// Where chunk `chunk` of row `row` lies: rows of 64 bytes are turned so that eight rows of a chunk hit all banks.
__device__ inline int cell(int row, int chunk) { return row * kStepBytes + (chunk ^ ((row >> 1) & 3)) * 16; }

// One stage: rows of the tile from `row` on, bytes of each from `first` on; rows at and past `rows` are zeros.
template <int TILE>
__device__ inline void copy_tile(unsigned char* shared, const void* source, int row, int rows, int first,
                                 int row_bytes) {
#pragma unroll
  for (int item = threadIdx.x; item < TILE * kChunks; item += kThreads) {
    const int own = item / kChunks, chunk = item % kChunks;
    const bool is_inside = row + own < rows;
    const size_t place = static_cast<size_t>(is_inside ? row + own : 0) * row_bytes + first + chunk * 16;
    copy_async(shared + cell(own, chunk), static_cast<const unsigned char*>(source) + place, is_inside);
  }
}

// This thread's rows of a tile among the block's queries, and its columns among the tile's rows of the bank.
__device__ inline int own_query(int own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return blockIdx.x * BM + (warp / kWarpsAcross) * kWarpRows + (own / 2) * 16 + (own % 2) * 8 + lane / 4;
}
__device__ inline int own_bank_row(int tile, int column) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return tile * BN + (warp % kWarpsAcross) * kWarpColumns + (column / 2) * 8 + (lane % 4) * 2 + column % 2;
}

template <typename Sum>
using Sums = Sum[kTilesDown][kTilesAcross][4];
template <typename Sum>
__device__ inline Sum at(const Sums<Sum>& sums, int own, int column) {
  return sums[own / 2][column / 2][(own % 2) * 2 + column % 2];
}

// keep(sums, tile): q.m + bias of this thread's rows and columns, for every tile of the slice in ascending order.
template <typename Sum, typename Keep>
__device__ inline void multiply_slice(const void* queries, const void* bank, const Sum* bias, int m, int np,
                                      int row_bytes, int tiles_a_split, Keep keep) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int first_query = blockIdx.x * BM;
  const int first_tile = blockIdx.y * tiles_a_split;
  const int last_tile = min(first_tile + tiles_a_split, np / BN);
  const int steps_a_tile = row_bytes / kStepBytes;
  const int steps = max(0, last_tile - first_tile) * steps_a_tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = (warp / kWarpsAcross) * kWarpRows, warp_column = (warp % kWarpsAcross) * kWarpColumns;
  Sums<Sum> sums;

  auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + (step % STAGES) * kStageBytes;
      const int first = (step % steps_a_tile) * kStepBytes, tile = first_tile + step / steps_a_tile;
      copy_tile<BM>(stage, queries, first_query, m, first, row_bytes);
      copy_tile<BN>(stage + BM * kStepBytes, bank, tile * BN, np, first, row_bytes);
    }
    commit_copies();  // also an empty group, so that counting groups stays counting steps
  };
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);

  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    synchronize();  // this step's copies are everyone's, and everyone is done with the stage that is filled next
    fetch(step + STAGES - 1);
    const int tile = first_tile + step / steps_a_tile;
    if (step % steps_a_tile == 0) {
#pragma unroll
      for (int across = 0; across < kTilesAcross; ++across) {
        const Sum* own = bias + own_bank_row(tile, across * 2);
        const Sum left = own[0], right = own[1];
#pragma unroll
        for (int down = 0; down < kTilesDown; ++down) {
          sums[down][across][0] = sums[down][across][2] = left;
          sums[down][across][1] = sums[down][across][3] = right;
        }
      }
    }
    const unsigned char* query_tile = shared + (step % STAGES) * kStageBytes;
    const unsigned char* bank_tile = query_tile + BM * kStepBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 bytes each
      unsigned columns[kTilesAcross / 2][4];
#pragma unroll
      for (int pair = 0; pair < kTilesAcross / 2; ++pair) {
        const int row = warp_column + pair * 16 + (lane / 16) * 8 + lane % 8;
        load_matrices(columns[pair], bank_tile + cell(row, half * 2 + (lane / 8) % 2));
      }
#pragma unroll
      for (int down = 0; down < kTilesDown; ++down) {
        unsigned rows[4];
        load_matrices(rows, query_tile + cell(warp_row + down * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
        for (int across = 0; across < kTilesAcross; ++across)
          multiply_add(sums[down][across], rows, columns[across / 2][(across % 2) * 2],
                       columns[across / 2][(across % 2) * 2 + 1]);
      }
    }
    if (step % steps_a_tile == steps_a_tile - 1) keep(sums, tile);
  }
  wait_copies<0>();
}

// The best of four neighbouring lanes, which share a query, into the query's key: the larger score, of equal ones the
// lower bank row. row < 0: nothing found, all NaN.
__device__ inline void keep_best(unsigned long long* keys, int query, int m, float score, int row) {
  unsigned long long key = 0;
  if (row >= 0) key = static_cast<unsigned long long>(orderable(score)) << 32 | static_cast<unsigned>(~row);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const unsigned long long other = exchange(key, lanes);
    key = other > key ? other : key;
  }
  if (threadIdx.x % 4 == 0 && query < m) keep_largest(keys + query, key);
}

// |one - other|^2 over d channels in f32, by a whole warp; every lane gets it.
__device__ inline float distance_sq(const float* one, const float* other, int d) {
  float sum = 0.0f;
  for (int channel = threadIdx.x % 32; channel < d; channel += 32) {
    const float difference = one[channel] - other[channel];
    sum += difference * difference;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += exchange(sum, lanes);
  return sum;
}

}  // namespace
