/* The bounds of nearest_cpu.c by AMX, Intel's matrix unit: it multiplies bf16 many times as fast as vectors do f32.
 *
 * Each number x is the sum of two bf16 numbers, h the nearest to x and l the nearest to x - h, and what is left is at
 * most 2^-16 |x|. Of a product, h h' + h l' + l h' is summed in float32; what that leaves out is at most 3 * 2^-16 of
 * |q| |c|, which pruned.py adds to the slack. The bias rides along, whole, in three pieces:
 *     a row      h, l, h of its K1 numbers, the pieces of -|c|^2 / 2
 *     a patch    h, h, l of its K1 numbers, 1, 1, 1
 * each padded with 0 to DEPTH. `halves` holds the rows as the unit reads them: (M/16 DEPTH/32 16 32).
 * So fast it outruns the memory, so bounds are not kept: of 16 rows the highest one is, and where that reaches the bar
 * the 16 are computed again in float32.
 */
#include "nearest_cpu.h"

#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define HAS_AMX
#endif
#endif

#ifdef HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, STEP = 32, DEPTH = (3 * K1 + 3 + STEP - 1) / STEP * STEP, STEPS = DEPTH / STEP, PIECE = SIDE * STEP };

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,fma,prefer-vector-width=512")))

int32_t may_use_amx(void) {
    enum { LEAF = 7, BF16 = 1 << 22, TILE = 1 << 24, ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(LEAF, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0; /* for all threads of the process */
}

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
};

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_bf16(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float widened;
    memcpy(&widened, &bits, sizeof widened);
    return widened;
}

/* (MOST_TILE K1) -> (MOST_TILE/16 DEPTH/2 16 2), as the unit reads its right operand: pairs of a patch side by side. */
AMX static void split(const float *projected, uint16_t *right) {
    for (int32_t p = 0; p < MOST_TILE; p++, projected += K1) {
        uint16_t halves[DEPTH] = {0};
        for (int32_t k = 0; k < K1; k++) {
            const uint16_t high = to_bf16(projected[k]);
            halves[k] = halves[K1 + k] = high;
            halves[2 * K1 + k] = to_bf16(projected[k] - from_bf16(high));
        }
        for (int32_t k = 3 * K1; k < 3 * K1 + 3; k++) halves[k] = 0x3f80; /* 1 */
        uint16_t *column = right + p / SIDE * DEPTH * SIDE + p % SIDE * 2;
        for (int32_t pair = 0; pair < DEPTH / 2; pair++) memcpy(column + pair * 2 * SIDE, halves + 2 * pair, 4);
    }
}

AMX static inline __attribute__((always_inline)) v16 higher(v16 one, v16 other) {
    return (v16)_mm512_max_ps((__m512)one, (__m512)other);
}

/* The highest of 16 rows for 16 patches, from a tile (16 rows, 16 patches) in memory. */
AMX static inline __attribute__((always_inline)) v16 top(const float *tile) {
    v16 found[4];
    for (int32_t row = 0; row < 4; row++) found[row] = *(const v16 *)(tile + row * SIDE);
    for (int32_t row = 4; row < SIDE; row++) found[row % 4] = higher(found[row % 4], *(const v16 *)(tile + row * SIDE));
    return higher(higher(found[0], found[1]), higher(found[2], found[3]));
}

/* (MOST_TILE K1) projected patches -> (M/16 MOST_TILE) the highest bound of each 16 rows. */
AMX void bound_amx(const struct bank *bank, const float *projected, float *tops) {
    static const struct tile_config config = {
        .palette = 1, .bytes_a_row = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    struct tile_config before;
    _Alignas(64) uint16_t right[MOST_TILE * DEPTH];
    _Alignas(64) float tiles[4][SIDE * SIDE];
    const uint16_t *rows = bank->halves, *others = right + SIDE * DEPTH;
    split(projected, right);
    _tile_storeconfig(&before); /* who else uses the unit in this thread may count on its own */
    _tile_loadconfig(&config);
    for (int32_t first = 0; first < bank->padded; first += 2 * SIDE, rows += 2 * STEPS * PIECE, tops += 2 * MOST_TILE) {
        __asm__ volatile("" ::: "memory"); /* the intrinsics do not tell the compiler what they read and write */
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int32_t step = 0; step < STEPS; step++) {
            _tile_loadd(4, rows + step * PIECE, 64);
            _tile_loadd(5, rows + (STEPS + step) * PIECE, 64);
            _tile_loadd(6, right + step * PIECE, 64);
            _tile_loadd(7, others + step * PIECE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, tiles[0], 64);
        _tile_stored(1, tiles[1], 64);
        _tile_stored(2, tiles[2], 64);
        _tile_stored(3, tiles[3], 64);
        __asm__ volatile("" ::: "memory");
        for (int32_t tile = 0; tile < 4; tile++) *(v16 *)(tops + tile * SIDE) = top(tiles[tile]);
    }
    _tile_loadconfig(&before);
}

/* The bounds of 16 rows for one patch, in float32. */
AMX static inline __attribute__((always_inline)) v16 bounds_of(const struct bank *bank, const float *projected,
                                                               int32_t first) {
    const float *block = bank->packed + (size_t)(first / BLOCK * BLOCK) * K1 + first % BLOCK;
    v16 sums[4] = {*(const v16 *)(bank->bias + first)};
    for (int32_t k = 0; k < K1; k++) sums[k % 4] += *(const v16 *)(block + (size_t)k * BLOCK) * projected[k];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

AMX static inline __attribute__((always_inline)) void measure_above(const struct bank *bank, struct patch *patch,
                                                                    v16 bounds, float level, int32_t first) {
    uint32_t left = _mm512_cmp_ps_mask((__m512)bounds, _mm512_set1_ps(level), _CMP_GE_OQ);
    for (; left; left &= left - 1) measure(patch, bank, first + __builtin_ctz(left));
}

/* As settle_avx512: each patch measures the row of its highest bound, and then whatever still reaches its bar. */
AMX void settle_amx(const struct bank *bank, struct patch *patches, const float *projected, const float *tops,
                    int32_t count) {
    const int32_t blocks = bank->padded / SIDE;
    for (int32_t group = 0; group < count; group += SIDE, tops += SIDE) {
        __m512 highest = _mm512_loadu_ps(tops);
        __m512i where = _mm512_setzero_si512();
        for (int32_t block = 1; block < blocks; block++) {
            const __m512 here = _mm512_loadu_ps(tops + block * MOST_TILE);
            const __mmask16 higher_here = _mm512_cmp_ps_mask(here, highest, _CMP_GT_OQ);
            highest = _mm512_mask_mov_ps(highest, higher_here, here);
            where = _mm512_mask_mov_epi32(where, higher_here, _mm512_set1_epi32(block));
        }
        int32_t blocks_of[SIDE];
        float bars[SIDE];
        _mm512_storeu_si512(blocks_of, where);
        for (int32_t lane = 0; lane < SIDE; lane++) {
            bars[lane] = NAN; /* no bound reaches it: an incomplete tile's */
            if (group + lane >= count) continue;
            struct patch *patch = &patches[group + lane];
            const int32_t first = blocks_of[lane] * SIDE;
            const v16 bounds = bounds_of(bank, projected + (group + lane) * K1, first);
            measure_first(patch, bank);
            measure_above(bank, patch, bounds, _mm512_reduce_max_ps((__m512)bounds), first);
            bars[lane] = bar(patch);
        }
        const __m512 wanted = _mm512_loadu_ps(bars);
        for (int32_t block = 0; block < blocks; block++) {
            uint32_t left = _mm512_cmp_ps_mask(_mm512_loadu_ps(tops + block * MOST_TILE), wanted, _CMP_GE_OQ);
            for (; left; left &= left - 1) {
                const int32_t p = group + __builtin_ctz(left);
                const v16 bounds = bounds_of(bank, projected + p * K1, block * SIDE);
                measure_above(bank, &patches[p], bounds, bar(&patches[p]), block * SIDE);
            }
        }
    }
}
#else
int32_t may_use_amx(void) { return 0; }
void bound_amx(const struct bank *bank, const float *projected, float *tops) { (void)bank, (void)projected, (void)tops; }
void settle_amx(const struct bank *bank, struct patch *patches, const float *projected, const float *tops,
                int32_t count) {
    (void)bank, (void)patches, (void)projected, (void)tops, (void)count;
}
#endif
