// A GPU played by one CPU thread: every CUDA thread of a block is a fibre, and a warp's operations (matrix loads,
// tensor-core products, shuffles) happen when all its 32 lanes have come to them. What it is for: the kernels' own
// arithmetic, indexing, barriers and copies, tested where there is no GPU. What it cannot show: speed, and races
// between warps that a real scheduler would order otherwise (compute-sanitizer does, in bench/gpu_check.sh).
//
// Shared memory is poisoned before every block. Asynchronous copies arrive as early as possible or as late as allowed
// (emulator_copies_are_late): an early one overwrites what is still read, a late one is not there when it is missed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::shared)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 232 << 10;
alignas(1024) inline unsigned char shared[kSharedBytes];
inline bool copies_are_late = false;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s\n", what);
  abort();
}

struct Copy {
  void* target;
  const void* source;
  bool is_wanted;
  void run() const {
    if (is_wanted)
      memcpy(target, source, 16);
    else
      memset(target, 0, 16);
  }
};

struct Warp {
  int arrived = 0, lanes = 0;
  long turn = 0;
  const char* operation = nullptr;
  void* arguments[32] = {};
};

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  Dim3 thread;
  int number = 0;
  bool is_done = false;
  std::function<bool()> may_go_on;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  Dim3 index, size, grid;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  int at_barrier = 0, alive = 0;
  long barrier_turn = 0;
  ucontext_t scheduler;
};

inline Block* block = nullptr;
inline Fibre* self = nullptr;
inline std::function<void()> body;

inline void wait_until(std::function<bool()> condition) {
  self->may_go_on = std::move(condition);
  swapcontext(&self->context, &block->scheduler);
}

// All lanes of the warp give their arguments; the last one computes for all.
template <typename Argument, typename Compute>
void together(const char* operation, Argument* argument, Compute compute) {
  Warp& warp = block->warps[self->number / 32];
  if (warp.arrived == 0)
    warp.operation = operation;
  else if (strcmp(warp.operation, operation) != 0)
    fail("lanes of one warp are at different operations");
  warp.arguments[self->number % 32] = argument;
  if (++warp.arrived == warp.lanes) {
    Argument* all[32];
    for (int lane = 0; lane < warp.lanes; ++lane) all[lane] = static_cast<Argument*>(warp.arguments[lane]);
    compute(all);
    warp.arrived = 0;
    ++warp.turn;
    return;
  }
  const long turn = warp.turn;
  Warp* own = &warp;
  wait_until([own, turn] { return own->turn != turn; });
}

inline void entry() {
  body();
  self->is_done = true;
  --block->alive;
  swapcontext(&self->context, &block->scheduler);
}

inline void run_block(const Dim3& grid, const Dim3& size, const Dim3& index) {
  Block now;
  now.index = index, now.size = size, now.grid = grid;
  const int threads = size.x * size.y * size.z;
  now.fibres.resize(threads);
  now.warps.resize((threads + 31) / 32);
  now.alive = threads;
  memset(shared, 0xff, sizeof shared);  // NaN as halves and as floats
  block = &now;
  for (int number = 0; number < threads; ++number) {
    Fibre& fibre = now.fibres[number];
    fibre.number = number;
    fibre.thread = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
    ++now.warps[number / 32].lanes;
    fibre.stack.resize(kStackBytes);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &now.scheduler;
    makecontext(&fibre.context, entry, 0);
  }
  while (now.alive > 0) {
    bool has_moved = false;
    for (Fibre& fibre : now.fibres) {
      if (fibre.is_done || (fibre.may_go_on && !fibre.may_go_on())) continue;
      fibre.may_go_on = nullptr;
      has_moved = true;
      self = &fibre;
      swapcontext(&now.scheduler, &fibre.context);
    }
    if (!has_moved) fail("every thread waits for another one: a barrier or a warp's operation that not all come to");
  }
  block = nullptr;
}

using Launcher = std::function<void(const Dim3&, const Dim3&, void**)>;
inline std::map<std::string, Launcher>& kernels() {
  static std::map<std::string, Launcher> found;
  return found;
}

template <typename... Arguments, size_t... Index>
void call(void (*kernel)(Arguments...), void** given, std::index_sequence<Index...>) {
  kernel(*static_cast<Arguments*>(given[Index])...);
}

template <typename... Arguments>
bool enlist(const char* name, void (*kernel)(Arguments...)) {
  kernels()[name] = [kernel](const Dim3& grid, const Dim3& size, void** given) {
    body = [kernel, given] { call(kernel, given, std::index_sequence_for<Arguments...>()); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) run_block(grid, size, {x, y, z});
  };
  return true;
}

inline float from_half_bits(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024.0f + fraction, exponent - 25) : ldexpf(fraction, -24));
}

inline uint16_t to_half_bits(float value) {  // to the nearest, ties to even
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < ldexpf(1.0f, -14)) return sign | static_cast<uint16_t>(lrintf(ldexpf(size, 24)));
  int exponent;
  const float fraction = frexpf(size, &exponent);  // 0.5 to 1
  long cells = lrintf(ldexpf(fraction, 11));        // 1024 to 2048
  if (cells == 2048) cells = 1024, ++exponent;
  return sign | static_cast<uint16_t>((exponent + 14) << 10 | (cells - 1024));
}

}  // namespace emulator

struct Half {
  uint16_t bits;
};
inline Half to_half(float value) { return {emulator::to_half_bits(value)}; }
inline float to_float(Half value) { return emulator::from_half_bits(value.bits); }

#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

template <typename Value>
Value min(Value one, Value other) {
  return other < one ? other : one;
}
template <typename Value>
Value max(Value one, Value other) {
  return one < other ? other : one;
}

inline void copy_async(void* shared, const void* global, bool is_wanted) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (is_wanted && reinterpret_cast<uintptr_t>(global) % 16))
    emulator::fail("a copy of 16 bytes that is not aligned to 16");
  emulator::self->open.push_back({shared, global, is_wanted});
  if (!emulator::copies_are_late) emulator::self->open.back().run();
}
inline void commit_copies() {
  emulator::self->groups.push_back(std::move(emulator::self->open));
  emulator::self->open.clear();
}
template <int PENDING>
void wait_copies() {
  auto& groups = emulator::self->groups;
  while (groups.size() > PENDING) {
    if (emulator::copies_are_late)
      for (const auto& copy : groups.front()) copy.run();
    groups.pop_front();
  }
}

inline void synchronize() {
  emulator::Block* block = emulator::block;
  if (++block->at_barrier == block->alive) {
    block->at_barrier = 0;
    ++block->barrier_turn;
    return;
  }
  const long turn = block->barrier_turn;
  emulator::wait_until([block, turn] { return block->barrier_turn != turn; });
}

inline void load_matrices(unsigned (&found)[4], const void* row) {
  struct Argument {
    unsigned* found;
    const unsigned char* row;
  } own{found, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a matrix row that is not aligned to 16");
  emulator::together("load_matrices", &own, [](Argument** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        memcpy(lanes[lane]->found + matrix, lanes[matrix * 8 + lane / 4]->row + lane % 4 * 4, 4);
  });
}

namespace emulator {

// The cells of a lane, by the tables of the PTX manual for m16n8k16 (16-bit) and m16n8k32 (8-bit): a register holds
// PACKED neighbours along k.
template <typename Sum, typename Cell, int PACKED, Sum (*VALUE)(Cell)>
void multiply(Sum (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Argument {
    Sum* sum;
    unsigned a[4], b[2];
  } own{sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  together("multiply_add", &own, [](Argument** lanes) {
    constexpr int kDeep = 8 * PACKED;
    Sum left[16][kDeep], right[kDeep][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, place = lane % 4 * PACKED;
      for (int item = 0; item < 4; ++item) {
        Cell cells[PACKED];
        memcpy(cells, &lanes[lane]->a[item], 4);
        for (int next = 0; next < PACKED; ++next)
          left[group + item % 2 * 8][place + item / 2 * 4 * PACKED + next] = VALUE(cells[next]);
      }
      for (int item = 0; item < 2; ++item) {
        Cell cells[PACKED];
        memcpy(cells, &lanes[lane]->b[item], 4);
        for (int next = 0; next < PACKED; ++next)
          right[place + item * 4 * PACKED + next][group] = VALUE(cells[next]);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int item = 0; item < 4; ++item) {
        const int row = lane / 4 + item / 2 * 8, column = lane % 4 * 2 + item % 2;
        Sum total = lanes[lane]->sum[item];
        for (int deep = 0; deep < kDeep; ++deep) total += left[row][deep] * right[deep][column];
        lanes[lane]->sum[item] = total;
      }
  });
}

inline float half_value(uint16_t bits) { return from_half_bits(bits); }
inline int byte_value(int8_t cell) { return cell; }

}  // namespace emulator

inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulator::multiply<float, uint16_t, 2, emulator::half_value>(sum, a, b0, b1);
}
inline void multiply_add(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulator::multiply<int, int8_t, 4, emulator::byte_value>(sum, a, b0, b1);
}

// Hopper's product of a warpgroup, by the PTX manual's tables for wgmma and its 128-byte swizzle: a descriptor's address is
// that of logical bytes, of which bits 4 to 6 are turned by bits 7 to 9. What cannot be shown: that a product waits for
// copies to be shown to it, and sums for the product.
#define HAS_GROUP_PRODUCT
inline void stop_launch() { emulator::fail("a kernel that this architecture does not have"); }
inline unsigned long long group_matrix(const void* start) {
  const unsigned long long address = static_cast<const unsigned char*>(start) - emulator::shared;
  return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
inline void show_copies() {}
inline void begin_group_products() {}
inline void end_group_products() {}

namespace emulator {

inline float group_value(unsigned long long matrix, int row, int column) {
  if (matrix >> 62 != 1) fail("a matrix of a warpgroup that is not in the 128-byte swizzle");
  const unsigned start = (matrix & 0x3fff) << 4, unit = (matrix >> 32 & 0x3fff) << 4;
  const unsigned logical = start + row / 8 * unit + row % 8 * 128 + column * 2;
  uint16_t bits;
  memcpy(&bits, shared + (logical ^ (logical >> 7 & 7) << 4), 2);
  return from_half_bits(bits);
}

}  // namespace emulator

inline void multiply_group(float (&sum)[16][4], unsigned long long a, unsigned long long b) {
  struct Argument {
    float (*sum)[4];
    unsigned long long a, b;
    int warp;
  } own{sum, a, b, emulator::self->number / 32 % 4};
  emulator::together("multiply_group", &own, [](Argument** lanes) {
    static float left[16][16], right[128][16];
    for (int deep = 0; deep < 16; ++deep) {
      for (int row = 0; row < 16; ++row)
        left[row][deep] = emulator::group_value(lanes[0]->a, lanes[0]->warp * 16 + row, deep);
      for (int row = 0; row < 128; ++row) right[row][deep] = emulator::group_value(lanes[0]->b, row, deep);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int across = 0; across < 16; ++across)
        for (int item = 0; item < 4; ++item)
          for (int deep = 0; deep < 16; ++deep)
            lanes[lane]->sum[across][item] +=
                left[lane / 4 + item / 2 * 8][deep] * right[across * 8 + lane % 4 * 2 + item % 2][deep];
  });
}

template <typename Value>
Value exchange(Value value, int lane_mask) {
  struct Argument {
    Value given, found;
    int lane_mask;
  } own{value, value, lane_mask};
  emulator::together("exchange", &own, [](Argument** lanes) {
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->found = lanes[lane ^ lanes[lane]->lane_mask]->given;
  });
  return own.found;
}

inline unsigned vote(bool answer) {
  struct Argument {
    bool answer;
    unsigned found;
  } own{answer, 0};
  emulator::together("vote", &own, [](Argument** lanes) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(lanes[lane]->answer) << lane;
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->found = bits;
  });
  return own.found;
}

inline void keep_largest(unsigned* cell, unsigned value) {
  if (value > *cell) *cell = value;
}
inline unsigned long long keep_largest(unsigned long long* cell, unsigned long long value) {
  const unsigned long long before = *cell;
  if (value > before) *cell = value;
  return before;
}

#define ENLIST(kernel) static const bool enlisted_##kernel = emulator::enlist(#kernel, kernel)

// The driver's cuLaunchKernel, with a kernel's name instead of its handle. 0 where the kernel is known.
extern "C" inline __attribute__((used)) int emulator_launch(const char* name, const unsigned* grid,
                                                           const unsigned* size, void** arguments, int late) {
  const auto found = emulator::kernels().find(name);
  if (found == emulator::kernels().end()) return 1;
  emulator::copies_are_late = late != 0;
  found->second({grid[0], grid[1], grid[2]}, {size[0], size[1], size[2]}, arguments);
  return 0;
}
