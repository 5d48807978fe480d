// ldknn.cu's search with Hopper's wgmma, in ldknn_search's place: the same arguments, bank, keys and result. For sm_90a
// alone; on any other architecture the kernel stops the launch. The daemon does not use it: no GPU has timed it yet.
//
//   ldknn_search_sm90  grid (ceil(M / 128), splits), 256 threads, kGroupStages * 32 KB of dynamic shared memory
//
// Two warpgroups have 64 queries each and all 128 rows of a tile: wgmma m64n128k16, FP16 operands from shared memory, FP32
// sums in registers that begin as the bias. Tiles of 64 channels are 128 bytes a row in the 128-byte swizzle that wgmma
// reads. They are brought by cp.async, not by TMA: a tensor map has to be encoded on the host for every bank and every
// buffer of queries, by a driver function that PyCUDA does not wrap, and cp.async fills the same layout.
// Each 64 channels end in a wait for the products: two blocks a multiprocessor take turns instead of a pipeline inside one.
#include "ldknn_tile.cuh"

namespace {

constexpr int kGroupStages = 3, kGroupBytes = 128;  // of a row at a time: 64 channels
constexpr int kGroupTile = 128, kGroupColumns = kGroupTile / 8;
constexpr int kGroupStageBytes = 2 * kGroupTile * kGroupBytes;

// 16 bytes `chunk` of row `row`: eight rows of 128 bytes are a unit, in which a row's number turns its chunks.
__device__ inline int group_cell(int row, int chunk) { return row * kGroupBytes + (chunk ^ (row & 7)) * 16; }

// One stage of queries or bank; rows at and past `rows`, and channels past the row's end, are zeros.
__device__ inline void copy_group(unsigned char* shared, const void* source, int row, int rows, int first,
                                  int row_bytes) {
#pragma unroll
  for (int item = threadIdx.x; item < kGroupTile * 8; item += kThreads) {
    const int own = item / 8, chunk = item % 8;
    const bool is_inside = row + own < rows && first + chunk * 16 < row_bytes;
    const size_t place = is_inside ? static_cast<size_t>(row + own) * row_bytes + first + chunk * 16 : 0;
    copy_async(shared + group_cell(own, chunk), static_cast<const unsigned char*>(source) + place, is_inside);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    ldknn_search_sm90(const Half* queries, const Half* bank, const float* bias, unsigned long long* keys, int m,
                      int np, int padded, int tiles_a_split) {
#ifdef HAS_GROUP_PRODUCT
  DYNAMIC_SHARED(unsigned char, shared);
  const int first_query = blockIdx.x * kGroupTile, row_bytes = padded * 2;
  const int first_tile = blockIdx.y * tiles_a_split;
  const int last_tile = min(first_tile + tiles_a_split, np / kGroupTile);
  const int steps_a_tile = (row_bytes + kGroupBytes - 1) / kGroupBytes;
  const int steps = max(0, last_tile - first_tile) * steps_a_tile;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
  float best[2] = {-INFINITY, -INFINITY};
  int best_row[2] = {-1, -1};
  float sums[kGroupColumns][4];

  auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + (step % kGroupStages) * kGroupStageBytes;
      const int first = (step % steps_a_tile) * kGroupBytes, tile = first_tile + step / steps_a_tile;
      copy_group(stage, queries, first_query, m, first, row_bytes);
      copy_group(stage + kGroupTile * kGroupBytes, bank, tile * kGroupTile, np, first, row_bytes);
    }
    commit_copies();  // also an empty group, so that counting groups stays counting steps
  };
  for (int step = 0; step < kGroupStages - 1; ++step) fetch(step);

  for (int step = 0; step < steps; ++step) {
    wait_copies<kGroupStages - 2>();
    show_copies();  // to wgmma, which reads shared memory by a way of its own
    synchronize();
    fetch(step + kGroupStages - 1);
    const int tile_row = (first_tile + step / steps_a_tile) * kGroupTile + (lane % 4) * 2;
    if (step % steps_a_tile == 0) {
#pragma unroll
      for (int across = 0; across < kGroupColumns; ++across) {
        sums[across][0] = sums[across][2] = bias[tile_row + across * 8];
        sums[across][1] = sums[across][3] = bias[tile_row + across * 8 + 1];
      }
    }
    const unsigned char* query_tile = shared + (step % kGroupStages) * kGroupStageBytes;
    const unsigned char* bank_tile = query_tile + kGroupTile * kGroupBytes;
    begin_group_products();
#pragma unroll
    for (int part = 0; part < 4; ++part)  // 16 channels each
      multiply_group(sums, group_matrix(query_tile + group * 64 * kGroupBytes + part * 32),
                     group_matrix(bank_tile + part * 32));
    end_group_products();
    if (step % steps_a_tile != steps_a_tile - 1) continue;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      float top = sums[0][lower * 2];
#pragma unroll
      for (int column = 1; column < 2 * kGroupColumns; ++column)
        top = fmaxf(top, sums[column / 2][lower * 2 + column % 2]);
      if (top > best[lower]) {
        best[lower] = top;
#pragma unroll
        for (int column = 2 * kGroupColumns - 1; column >= 0; --column)  // the lowest of equal ones stays
          if (sums[column / 2][lower * 2 + column % 2] == top)
            best_row[lower] = tile_row + (column / 2) * 8 + column % 2;
      }
    }
  }
  wait_copies<0>();

#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int query = first_query + (threadIdx.x / 32) * 16 + lower * 8 + lane / 4;
    keep_best(keys, query, m, best[lower], best_row[lower]);
  }
#else
  stop_launch();
#endif
}

ENLIST(ldknn_search_sm90);
