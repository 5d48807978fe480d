// ldknn.cu's search in INT8: twice the tensor cores' rate and half the bank's bytes. INT8 cannot tell near rows apart, so
// the search names the KEPT best rows of each query, and their distances in f32 decide. Reference: tests/reference.py,
// ldknn_int8; how often the nearest row is among the KEPT: bench/int8.py. Axes as in ldknn.cu; Dp is D padded with zeros
// to 64, Np is N padded to BN with zero rows of bias -2^30.
//
// Three launches, all on one stream, scores and winners as ldknn.cu's:
//   ldknn_int8_round   (M threads' worth, any grid)  features (M D) f32 -> queries (M Dp) i8; keys (M KEPT) = 0
//   ldknn_int8_search  as ldknn_tile.cuh says, the bank in INT8
//   ldknn_int8_finish  grid ceil(M / 8), 256 threads, one warp a query -> scores (M) f32, winners (M) i32
//
// One scale for the whole bank, and its mean as the origin, which no distance knows of: x -> round((x - centre) * inverse),
// to -127 .. 127. The bias floor(-|m|^2 / 2) of the rounded row is an integer, so a sum is exact to half a unit, and
// the order of equal sums is the rows': nothing depends on the splits, or on which block comes first.
#include "ldknn_tile.cuh"

#ifndef KEPT
#define KEPT 4  // rows of each query whose distances are taken anew
#endif

namespace {

template <typename Value>
__device__ inline void swap(Value& one, Value& other) {
  const Value kept = one;
  one = other;
  other = kept;
}

// `values` fall; a new one goes in before lower ones and behind equal ones, its row with it.
__device__ inline void insert(int (&values)[KEPT], int (&rows)[KEPT], int value, int row) {
  if (value <= values[KEPT - 1]) return;
  values[KEPT - 1] = value;
  rows[KEPT - 1] = row;
#pragma unroll
  for (int place = KEPT - 1; place > 0; --place)
    if (values[place] > values[place - 1]) {
      swap(values[place], values[place - 1]);
      swap(rows[place], rows[place - 1]);
    }
}
__device__ inline void insert(unsigned long long (&keys)[KEPT], unsigned long long key) {
  if (key <= keys[KEPT - 1]) return;
  keys[KEPT - 1] = key;
#pragma unroll
  for (int place = KEPT - 1; place > 0; --place)
    if (keys[place] > keys[place - 1]) swap(keys[place], keys[place - 1]);
}

}  // namespace

extern "C" __global__ void ldknn_int8_round(const float* features, const float* centre, signed char* queries,
                                            unsigned long long* keys, float inverse, int m, int d, int padded) {
  const size_t all = static_cast<size_t>(m) * padded;
  for (size_t item = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; item < all;
       item += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const int row = static_cast<int>(item / padded), channel = static_cast<int>(item % padded);
    float value = 0.0f;
    if (channel < d) value = (features[static_cast<size_t>(row) * d + channel] - centre[channel]) * inverse;
    queries[item] = static_cast<signed char>(rintf(fminf(fmaxf(value, -127.0f), 127.0f)));  // NaN becomes -127
    if (channel < KEPT) keys[static_cast<size_t>(row) * KEPT + channel] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    ldknn_int8_search(const signed char* queries, const signed char* bank, const int* bias, unsigned long long* keys,
                      int m, int np, int padded, int tiles_a_split) {
  int best[kOwnRows][KEPT], best_row[kOwnRows][KEPT];
#pragma unroll
  for (int own = 0; own < kOwnRows; ++own)
#pragma unroll
    for (int place = 0; place < KEPT; ++place) {
      best[own][place] = INT32_MIN;
      best_row[own][place] = -1;
    }
  multiply_slice(queries, bank, bias, m, np, padded, tiles_a_split, [&](const Sums<int>& sums, int tile) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      int top = at(sums, own, 0);
#pragma unroll
      for (int column = 1; column < kOwnColumns; ++column) top = max(top, at(sums, own, column));
      if (top > best[own][KEPT - 1]) {  // rare once some tiles are seen
#pragma unroll
        for (int column = 0; column < kOwnColumns; ++column)
          insert(best[own], best_row[own], at(sums, own, column), own_bank_row(tile, column));
      }
    }
  });
#pragma unroll
  for (int own = 0; own < kOwnRows; ++own) {
    unsigned long long key[KEPT];
#pragma unroll
    for (int place = 0; place < KEPT; ++place) {
      const unsigned ordered = static_cast<unsigned>(best[own][place]) ^ 0x80000000u;
      key[place] = static_cast<unsigned long long>(ordered) << 32 | static_cast<unsigned>(~best_row[own][place]);
      if (best_row[own][place] < 0) key[place] = 0;
    }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      unsigned long long other[KEPT];
#pragma unroll
      for (int place = 0; place < KEPT; ++place) other[place] = exchange(key[place], lanes);
#pragma unroll
      for (int place = 0; place < KEPT; ++place) insert(key, other[place]);
    }
    if (threadIdx.x % 4 != 0 || own_query(own) >= m) continue;
    unsigned long long* cells = keys + static_cast<size_t>(own_query(own)) * KEPT;
#pragma unroll
    for (int place = 0; place < KEPT; ++place) keep_largest<KEPT>(cells, key[place]);
  }
}

// features (M D), core (N D), density (N) in f32. The nearest of the kept rows, the lowest of equal ones; a query that
// has no finite distance (NaN) keeps NaN, which the daemon rejects.
extern "C" __global__ void ldknn_int8_finish(const float* features, const float* core, const float* density,
                                             const unsigned long long* keys, float* scores, int* winners, float alpha,
                                             int m, int n, int d) {
  const int query = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (query >= m) return;  // a whole warp at once
  float nearest = INFINITY;
  int winner = -1;
  for (int place = 0; place < KEPT; ++place) {
    const unsigned long long key = keys[static_cast<size_t>(query) * KEPT + place];
    const unsigned row = ~static_cast<unsigned>(key);
    if (key == 0 || row >= static_cast<unsigned>(n)) continue;  // of fewer rows than are kept, or one that only pads
    const float distance =
        distance_sq(features + static_cast<size_t>(query) * d, core + static_cast<size_t>(row) * d, d);
    const bool is_lower = distance == nearest && static_cast<int>(row) < winner;
    if (!(distance < nearest || is_lower)) continue;
    nearest = distance;
    winner = static_cast<int>(row);
  }
  if (threadIdx.x % 32 != 0) return;
  scores[query] = winner >= 0 ? nearest - alpha * density[winner] : NAN;
  winners[query] = winner;
}

ENLIST(ldknn_int8_round);
ENLIST(ldknn_int8_search);
ENLIST(ldknn_int8_finish);
