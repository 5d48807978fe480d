// A camera's frame -> the network's input, in one pass: area resampling (bilinear on a side that grows), rounding to the
// camera's own levels as OpenCV rounds, (x - mean) / std, planar, FP16. Reference: tests/reference.py, normalise; the
// CPU's own (cpu.py, normalise) rounds the same way, so that both differ by one level at most, where a sum lies within
// a float's error of a half.
//
//   preprocess_<format>  grid (ceil(w / 32), ceil(h / 8)), block (32, 8); frame (H W C) -> input (3 h w)
//
// Which rows of the frame make a row of the output, and with which weights, comes in tables: `first` (h) and `weights`
// (h taps), made once for each frame size (tables.py), the same for columns. A frame is read once from DRAM: the
// threads of a warp read neighbouring footprints, whose overlap is in the L1 cache.
#include "primitives.cuh"

namespace {

struct Color {
  float red, green, blue;
};

struct Side {
  const int* first;
  const float* weights;
  int taps;
};

// Each format reads one pixel of the frame as a colour.
struct Mono8 {
  using Cell = unsigned char;
  __device__ static Color read(const Cell* frame, int y, int x, int, int width) {
    const float gray = frame[static_cast<size_t>(y) * width + x];
    return {gray, gray, gray};
  }
};
struct Mono16 {
  using Cell = unsigned short;
  __device__ static Color read(const Cell* frame, int y, int x, int, int width) {
    const float gray = frame[static_cast<size_t>(y) * width + x];
    return {gray, gray, gray};
  }
};
struct Rgb8 {
  using Cell = unsigned char;
  __device__ static Color read(const Cell* frame, int y, int x, int, int width) {
    const Cell* pixel = frame + (static_cast<size_t>(y) * width + x) * 3;
    return {static_cast<float>(pixel[0]), static_cast<float>(pixel[1]), static_cast<float>(pixel[2])};
  }
};
struct Bgr8 {
  using Cell = unsigned char;
  __device__ static Color read(const Cell* frame, int y, int x, int, int width) {
    const Cell* pixel = frame + (static_cast<size_t>(y) * width + x) * 3;
    return {static_cast<float>(pixel[2]), static_cast<float>(pixel[1]), static_cast<float>(pixel[0])};
  }
};
// Rows R G R G .., G B G B ..: bilinear, rounded half up, the outermost pixels those beside them: OpenCV's.
struct BayerRg8 {
  using Cell = unsigned char;
  __device__ static Color read(const Cell* frame, int y, int x, int height, int width) {
    y = min(max(y, 1), height - 2);
    x = min(max(x, 1), width - 2);
    const Cell* at = frame + static_cast<size_t>(y) * width + x;
    const int own = at[0], across = at[-1] + at[1], down = at[-width] + at[width];
    const int corners = at[-width - 1] + at[-width + 1] + at[width - 1] + at[width + 1];
    const float cross = static_cast<float>((across + down + 2) >> 2), diagonal = static_cast<float>((corners + 2) >> 2);
    const float beside = static_cast<float>((across + 1) >> 1), above = static_cast<float>((down + 1) >> 1);
    const float self = static_cast<float>(own);
    if (y % 2 == 0) return x % 2 == 0 ? Color{self, cross, diagonal} : Color{beside, self, above};
    return x % 2 == 0 ? Color{above, self, beside} : Color{diagonal, cross, self};
  }
};

template <typename Format>
__device__ inline void preprocess(const typename Format::Cell* frame, Half* input, Side rows, Side columns,
                                  const float* scale, const float* offset, int height, int width, int h, int w) {
  const int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 8 + threadIdx.y;
  if (x >= w || y >= h) return;
  Color sum = {0.0f, 0.0f, 0.0f};
  for (int down = 0; down < rows.taps; ++down) {
    const float row_weight = rows.weights[y * rows.taps + down];
    if (row_weight == 0.0f) continue;  // padding of the table; its row may lie outside the frame
    Color line = {0.0f, 0.0f, 0.0f};
    for (int across = 0; across < columns.taps; ++across) {
      const float weight = columns.weights[x * columns.taps + across];
      if (weight == 0.0f) continue;
      const Color pixel = Format::read(frame, rows.first[y] + down, columns.first[x] + across, height, width);
      line.red += weight * pixel.red;
      line.green += weight * pixel.green;
      line.blue += weight * pixel.blue;
    }
    sum.red += row_weight * line.red;
    sum.green += row_weight * line.green;
    sum.blue += row_weight * line.blue;
  }
  const size_t plane = static_cast<size_t>(h) * w, place = static_cast<size_t>(y) * w + x;
  input[place] = to_half(rintf(sum.red) * scale[0] - offset[0]);
  input[plane + place] = to_half(rintf(sum.green) * scale[1] - offset[1]);
  input[2 * plane + place] = to_half(rintf(sum.blue) * scale[2] - offset[2]);
}

}  // namespace

// scale (3) and offset (3): 1 / std and mean / std, with 1 / 257 in the scale of 16-bit frames.
#define PREPROCESS(name, Format)                                                                                   \
  extern "C" __global__ void name(const Format::Cell* frame, Half* input, const int* row_first,                    \
                                  const float* row_weights, int row_taps, const int* column_first,                 \
                                  const float* column_weights, int column_taps, const float* scale,                \
                                  const float* offset, int height, int width, int h, int w) {                      \
    preprocess<Format>(frame, input, {row_first, row_weights, row_taps},                                           \
                       {column_first, column_weights, column_taps}, scale, offset, height, width, h, w);           \
  }                                                                                                                \
  ENLIST(name)

PREPROCESS(preprocess_mono8, Mono8);
PREPROCESS(preprocess_mono16, Mono16);
PREPROCESS(preprocess_rgb8, Rgb8);
PREPROCESS(preprocess_bgr8, Bgr8);
PREPROCESS(preprocess_bayerrg8, BayerRg8);
