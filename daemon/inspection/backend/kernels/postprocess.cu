// Patch scores of the branches -> the final map, its maximum and its mask, in one pass. Reference: tests/reference.py,
// smoothed_map; axes: gh gw the grid of P patches, h w the network's pixels.
//
//   postprocess_start  one thread: the score's cell is emptied
//   postprocess        grid (ceil(w / 32), ceil(h / 8)), block (32, 8) -> map (h w) f32, mask (h ceil(w / 32)) of bits,
//                      score (1) as an ordered integer
//
// Each branch enters as (scores - centre) * factor. Upsampling and Gaussian are one banded operator a side (cpu.py,
// smoothing_operator), given as tables `first` and `weights` (h taps): at 256 pixels and 32 cells some seven cells
// a side matter to a pixel, so that both sides at once cost less than a second launch would.
// Bit i of mask word j is pixel 32 j + i; a pixel is set from the limit on. A NaN is the largest score of all.
#include "primitives.cuh"

extern "C" __global__ void postprocess_start(unsigned* score) { *score = 0; }

// A branch that the engine does not have is null.
extern "C" __global__ void postprocess(const float* repair, const float* ldknn, float repair_centre,
                                       float repair_factor, float ldknn_centre, float ldknn_factor,
                                       const int* row_first, const float* row_weights, int row_taps,
                                       const int* column_first, const float* column_weights, int column_taps,
                                       float* map, unsigned* mask, unsigned* score, float limit, int gw, int h,
                                       int w) {
  const int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 8 + threadIdx.y;
  const bool is_inside = x < w && y < h;
  float sum = 0.0f;
  if (is_inside) {
    for (int down = 0; down < row_taps; ++down) {
      const float row_weight = row_weights[y * row_taps + down];
      if (row_weight == 0.0f) continue;
      float line = 0.0f;
      for (int across = 0; across < column_taps; ++across) {
        const float weight = column_weights[x * column_taps + across];
        if (weight == 0.0f) continue;
        const int patch = (row_first[y] + down) * gw + column_first[x] + across;
        float value = 0.0f;
        if (repair != nullptr) value += (repair[patch] - repair_centre) * repair_factor;
        if (ldknn != nullptr) value += (ldknn[patch] - ldknn_centre) * ldknn_factor;
        line += weight * value;
      }
      sum += row_weight * line;
    }
    map[static_cast<size_t>(y) * w + x] = sum;
  }
  const unsigned bits = vote(is_inside && sum >= limit);
  unsigned top = is_inside ? orderable(sum) : 0;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const unsigned other = exchange(top, lanes);
    top = other > top ? other : top;
  }
  if (threadIdx.x != 0 || y >= h) return;
  mask[static_cast<size_t>(y) * ((w + 31) / 32) + blockIdx.x] = bits;
  keep_largest(score, top);
}

ENLIST(postprocess_start);
ENLIST(postprocess);
