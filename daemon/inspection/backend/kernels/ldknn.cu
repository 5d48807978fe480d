// Exact nearest neighbour with local density: score(q) = |q - m*|^2 - alpha * density(m*), m* = argmin_m |q - m|^2
// (Lyu et al. 2023, REB, section 3.3; squared L2). Reference: tests/reference.py, ldknn. Axes: M queries, N rows of the
// bank, D channels; Dp is D padded with zeros to 32, Np is N padded to BN with zero rows of bias -3e38.
//
// Three launches, all on one stream:
//   ldknn_round   (M threads' worth, any grid)  features (M D) f32 -> queries (M Dp) f16; keys (M) = 0
//   ldknn_search  grid (ceil(M / BM), splits), 256 threads, SHARED_BYTES dynamic shared memory
//   ldknn_finish  grid ceil(M / 8), 256 threads, one warp a query -> scores (M) f32, winners (M) i32
//
// The search maximises q.m - |m|^2 / 2, the same order as the smallest distance. The bias -|m|^2 / 2 is the accumulator's
// first value, so that nothing is added afterwards, and it is of the ROUNDED row: with the original row's norm the
// winner of nearly equal rows would be wrong. No score is ever written: each thread keeps (value, row) in registers for
// its whole slice of the bank. A block's winners meet those of other slices in a 64-bit maximum of (value, ~row):
// deterministic, and equal values go to the lowest row. The winner's distance is then taken anew in f32.
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
constexpr int kStep = 32;           // channels at a time: a row of 64 bytes, four chunks of 16
constexpr int kChunks = 4;
constexpr int kStageCells = (BM + BN) * kStep;
static_assert((BM / kWarpRows) * kWarpsAcross * 32 == kThreads, "the warps must cover the tile");

// Where chunk `chunk` of row `row` lies: rows of 64 bytes are turned so that eight rows of a chunk hit all banks.
__device__ inline int cell(int row, int chunk) { return row * kStep + ((chunk ^ ((row >> 1) & 3)) * 8); }

// One stage: rows of the tile from `row` on, channels from `channel` on; rows at and past `rows` are zeros.
template <int TILE>
__device__ inline void copy_tile(Half* shared, const Half* source, int row, int rows, int channel, int padded) {
#pragma unroll
  for (int item = threadIdx.x; item < TILE * kChunks; item += kThreads) {
    const int own = item / kChunks, chunk = item % kChunks;
    const bool is_inside = row + own < rows;
    const size_t place = static_cast<size_t>(is_inside ? row + own : 0) * padded + channel + chunk * 8;
    copy_async(shared + cell(own, chunk), source + place, is_inside);
  }
}

}  // namespace

extern "C" __global__ void ldknn_round(const float* features, Half* queries, unsigned long long* keys, int m, int d,
                                       int padded) {
  const size_t all = static_cast<size_t>(m) * padded;
  for (size_t item = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; item < all;
       item += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const int row = static_cast<int>(item / padded), channel = static_cast<int>(item % padded);
    queries[item] = to_half(channel < d ? features[static_cast<size_t>(row) * d + channel] : 0.0f);
    if (channel == 0) keys[row] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    ldknn_search(const Half* queries, const Half* bank, const float* bias, unsigned long long* keys, int m, int np,
                 int padded, int tiles_a_split) {
  DYNAMIC_SHARED(Half, shared);
  const int first_query = blockIdx.x * BM;
  const int first_tile = blockIdx.y * tiles_a_split;
  const int last_tile = min(first_tile + tiles_a_split, np / BN);
  const int steps_a_tile = padded / kStep;
  const int steps = max(0, last_tile - first_tile) * steps_a_tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = (warp / kWarpsAcross) * kWarpRows, warp_column = (warp % kWarpsAcross) * kWarpColumns;

  float best[2 * kTilesDown];
  int best_row[2 * kTilesDown];
#pragma unroll
  for (int own = 0; own < 2 * kTilesDown; ++own) {
    best[own] = -INFINITY;
    best_row[own] = -1;
  }
  float sums[kTilesDown][kTilesAcross][4];

  auto fetch = [&](int step) {
    if (step < steps) {
      Half* stage = shared + (step % STAGES) * kStageCells;
      const int channel = (step % steps_a_tile) * kStep, tile = first_tile + step / steps_a_tile;
      copy_tile<BM>(stage, queries, first_query, m, channel, padded);
      copy_tile<BN>(stage + BM * kStep, bank, tile * BN, np, channel, padded);
    }
    commit_copies();  // also an empty group, so that counting groups stays counting steps
  };
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);

  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    synchronize();  // this step's copies are everyone's, and everyone is done with the stage that is filled next
    fetch(step + STAGES - 1);
    const int tile_row = (first_tile + step / steps_a_tile) * BN + warp_column;
    if (step % steps_a_tile == 0) {
#pragma unroll
      for (int across = 0; across < kTilesAcross; ++across) {
        const float* own = bias + tile_row + across * 8 + (lane % 4) * 2;
        const float left = own[0], right = own[1];
#pragma unroll
        for (int down = 0; down < kTilesDown; ++down) {
          sums[down][across][0] = sums[down][across][2] = left;
          sums[down][across][1] = sums[down][across][3] = right;
        }
      }
    }
    const Half* query_tile = shared + (step % STAGES) * kStageCells;
    const Half* bank_tile = query_tile + BM * kStep;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 16 channels each
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
    if (step % steps_a_tile != steps_a_tile - 1) continue;
#pragma unroll
    for (int down = 0; down < kTilesDown; ++down)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int own = down * 2 + lower;
        float top = sums[down][0][lower * 2];
#pragma unroll
        for (int column = 1; column < 2 * kTilesAcross; ++column)
          top = fmaxf(top, sums[down][column / 2][lower * 2 + column % 2]);
        if (top > best[own]) {  // rare once some tiles are seen, so the search for the column costs little
          best[own] = top;
#pragma unroll
          for (int column = 2 * kTilesAcross - 1; column >= 0; --column)  // the lowest of equal ones stays
            if (sums[down][column / 2][lower * 2 + column % 2] == top)
              best_row[own] = tile_row + (column / 2) * 8 + (lane % 4) * 2 + column % 2;
        }
      }
  }
  wait_copies<0>();

#pragma unroll
  for (int own = 0; own < 2 * kTilesDown; ++own) {
    unsigned long long key = 0;  // nothing found: all NaN
    if (best_row[own] >= 0)
      key = static_cast<unsigned long long>(orderable(best[own])) << 32 | static_cast<unsigned>(~best_row[own]);
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const unsigned long long other = exchange(key, lanes);
      key = other > key ? other : key;
    }
    const int query = first_query + warp_row + (own / 2) * 16 + (own % 2) * 8 + lane / 4;
    if (lane % 4 == 0 && query < m) keep_largest(keys + query, key);
  }
}

// features (M D), core (N D), density (N) in f32. A query without a winner (NaN) keeps NaN, which the daemon rejects.
extern "C" __global__ void ldknn_finish(const float* features, const float* core, const float* density,
                                        const unsigned long long* keys, float* scores, int* winners, float alpha,
                                        int m, int n, int d) {
  const int query = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (query >= m) return;  // a whole warp at once
  const unsigned winner = ~static_cast<unsigned>(keys[query]);
  const bool is_found = keys[query] != 0 && winner < static_cast<unsigned>(n);
  const float* own = features + static_cast<size_t>(query) * d;
  const float* row = core + static_cast<size_t>(is_found ? winner : 0) * d;
  float sum = 0.0f;
  for (int channel = lane; channel < d; channel += 32) {
    const float difference = own[channel] - row[channel];
    sum += difference * difference;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += exchange(sum, lanes);
  if (lane != 0) return;
  scores[query] = is_found ? sum - alpha * density[winner] : NAN;
  winners[query] = is_found ? static_cast<int>(winner) : -1;
}

ENLIST(ldknn_round);
ENLIST(ldknn_search);
ENLIST(ldknn_finish);
