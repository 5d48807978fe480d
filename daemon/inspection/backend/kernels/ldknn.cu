// Exact nearest neighbour with local density: score(q) = |q - m*|^2 - alpha * density(m*), m* = argmin_m |q - m|^2
// (Lyu et al. 2023, REB, section 3.3; squared L2). Reference: tests/reference.py, ldknn. Axes: M queries, N rows of the
// bank, D channels; Dp is D padded with zeros to 32, Np is N padded to BN with zero rows of bias -3e38.
//
// Three launches, all on one stream:
//   ldknn_round   (M threads' worth, any grid)  features (M D) f32 -> queries (M Dp) f16; keys (M) = 0
//   ldknn_search  as ldknn_tile.cuh says, the bank in FP16
//   ldknn_finish  grid ceil(M / 8), 256 threads, one warp a query -> scores (M) f32, winners (M) i32
//
// The search maximises q.m - |m|^2 / 2, the same order as the smallest distance. The bias -|m|^2 / 2 is the accumulator's
// first value, so that nothing is added afterwards, and it is of the ROUNDED row: with the original row's norm the
// winner of nearly equal rows would be wrong. No score is ever written: each thread keeps (value, row) in registers for
// its whole slice of the bank. A block's winners meet those of other slices in a 64-bit maximum of (value, ~row):
// deterministic, and equal values go to the lowest row. The winner's distance is then taken anew in f32.
#include "ldknn_tile.cuh"

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
  float best[kOwnRows];
  int best_row[kOwnRows];
#pragma unroll
  for (int own = 0; own < kOwnRows; ++own) {
    best[own] = -INFINITY;
    best_row[own] = -1;
  }
  multiply_slice(queries, bank, bias, m, np, padded * 2, tiles_a_split, [&](const Sums<float>& sums, int tile) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      float top = at(sums, own, 0);
#pragma unroll
      for (int column = 1; column < kOwnColumns; ++column) top = fmaxf(top, at(sums, own, column));
      if (top > best[own]) {  // rare once some tiles are seen, so the search for the column costs little
        best[own] = top;
#pragma unroll
        for (int column = kOwnColumns - 1; column >= 0; --column)  // the lowest of equal ones stays
          if (at(sums, own, column) == top) best_row[own] = own_bank_row(tile, column);
      }
    }
  });
#pragma unroll
  for (int own = 0; own < kOwnRows; ++own) keep_best(keys, own_query(own), m, best[own], best_row[own]);
}

// features (M D), core (N D), density (N) in f32. A query without a winner (NaN) keeps NaN, which the daemon rejects.
extern "C" __global__ void ldknn_finish(const float* features, const float* core, const float* density,
                                        const unsigned long long* keys, float* scores, int* winners, float alpha,
                                        int m, int n, int d) {
  const int query = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (query >= m) return;  // a whole warp at once
  const unsigned winner = ~static_cast<unsigned>(keys[query]);
  const bool is_found = keys[query] != 0 && winner < static_cast<unsigned>(n);
  const float distance =
      distance_sq(features + static_cast<size_t>(query) * d, core + static_cast<size_t>(is_found ? winner : 0) * d, d);
  if (threadIdx.x % 32 != 0) return;
  scores[query] = is_found ? distance - alpha * density[winner] : NAN;
  winners[query] = is_found ? static_cast<int>(winner) : -1;
}

ENLIST(ldknn_round);
ENLIST(ldknn_search);
ENLIST(ldknn_finish);
