// What the kernels need of the hardware, one small function each. tests/emulator.h gives the same names on a CPU, lane
// by lane, so that every kernel's arithmetic, indexing and order of copies is tested where there is no GPU.
#pragma once
#ifdef INSPECTD_EMULATED
#include "emulator.h"
#else
#include <cuda_fp16.h>
#include <stdint.h>

using Half = __half;
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#define ENLIST(kernel) static_assert(true, "only the emulator keeps a list of kernels")

__device__ inline Half to_half(float value) { return __float2half_rn(value); }
__device__ inline float to_float(Half value) { return __half2float(value); }

// 16 bytes global -> shared, without a register between; zeros where they are not wanted.
__device__ inline void copy_async(void* shared, const void* global, bool is_wanted) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = is_wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's newest groups are still on their way.
template <int PENDING>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit cells (or 8x16 of 8-bit); lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(unsigned (&found)[4], const void* row) {
  const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(source)
               : "memory");
}

// sum += A (16 16, FP16, row-major) x B (16 8, FP16, column-major); FP32 accumulators.
__device__ inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with A (16 32) and B (32 8) of INT8 and INT32 accumulators.
__device__ inline void multiply_add(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Hopper's product of a warpgroup, from shared memory in its 128-byte swizzle: rows of 128 bytes, eight of them a unit.
__device__ inline void stop_launch() { asm volatile("trap;"); }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_GROUP_PRODUCT
// The descriptor of a matrix whose first 16-byte chunk lies at `start`; units of eight rows are 1,024 bytes apart.
__device__ inline unsigned long long group_matrix(const void* start) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(start));
  return (address & 0x3ffffu) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
__device__ inline void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void begin_group_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_group_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// sum += A (64 16) x B (128 16)^T, FP16; a warp has 16 of the rows, a lane the cells that multiply_add gives it.
__device__ inline void multiply_group(float (&sum)[16][4], unsigned long long a, unsigned long long b) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;}"
      : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]),
        "+f"(sum[1][0]), "+f"(sum[1][1]), "+f"(sum[1][2]), "+f"(sum[1][3]),
        "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]),
        "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3]),
        "+f"(sum[4][0]), "+f"(sum[4][1]), "+f"(sum[4][2]), "+f"(sum[4][3]),
        "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]),
        "+f"(sum[6][0]), "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]),
        "+f"(sum[7][0]), "+f"(sum[7][1]), "+f"(sum[7][2]), "+f"(sum[7][3]),
        "+f"(sum[8][0]), "+f"(sum[8][1]), "+f"(sum[8][2]), "+f"(sum[8][3]),
        "+f"(sum[9][0]), "+f"(sum[9][1]), "+f"(sum[9][2]), "+f"(sum[9][3]),
        "+f"(sum[10][0]), "+f"(sum[10][1]), "+f"(sum[10][2]), "+f"(sum[10][3]),
        "+f"(sum[11][0]), "+f"(sum[11][1]), "+f"(sum[11][2]), "+f"(sum[11][3]),
        "+f"(sum[12][0]), "+f"(sum[12][1]), "+f"(sum[12][2]), "+f"(sum[12][3]),
        "+f"(sum[13][0]), "+f"(sum[13][1]), "+f"(sum[13][2]), "+f"(sum[13][3]),
        "+f"(sum[14][0]), "+f"(sum[14][1]), "+f"(sum[14][2]), "+f"(sum[14][3]),
        "+f"(sum[15][0]), "+f"(sum[15][1]), "+f"(sum[15][2]), "+f"(sum[15][3])
      : "l"(a), "l"(b));
}
#endif

template <typename Value>
__device__ inline Value exchange(Value value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
// Bit i: lane i's answer.
__device__ inline unsigned vote(bool answer) { return __ballot_sync(0xffffffffu, answer); }
__device__ inline void synchronize() { __syncthreads(); }
__device__ inline void keep_largest(unsigned* cell, unsigned value) { atomicMax(cell, value); }
// What was there before.
__device__ inline unsigned long long keep_largest(unsigned long long* cell, unsigned long long value) {
  return atomicMax(cell, value);
}
#endif

// The COUNT largest of all values that come, falling, whatever the order they come in: what a cell gives up, or does not
// take, goes on to the next one. The last cell only grows, so that a value below it needs no visit.
template <int COUNT>
__device__ inline void keep_largest(unsigned long long* cells, unsigned long long value) {
  if (value <= *static_cast<volatile unsigned long long*>(cells + COUNT - 1)) return;
  for (int place = 0; place < COUNT && value != 0; ++place) {
    const unsigned long long before = keep_largest(cells + place, value);
    value = before < value ? before : value;
  }
}

// Floats in the order of unsigned integers; a NaN, of whatever sign, is the largest of all.
__device__ inline unsigned orderable(float value) {
  union {
    float value;
    unsigned bits;
  } both;
  both.value = value;
  if (value != value) return 0xffffffffu;
  return both.bits & 0x80000000u ? ~both.bits : both.bits | 0x80000000u;
}
