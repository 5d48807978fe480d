/* The nearest row of a memory bank for each patch, by squared L2, exact, on a CPU.
 *
 * Reference: tests/reference.py, distances_sq. Called by daemon/inspection/backend/pruned.py, which says what is what.
 *
 * Most rows are ruled out by a bound that costs K + 1 multiplications in place of C: in a basis whose first K axes hold
 * most of the bank's spread,
 *     q.c <= q_K.c_K + |q_R| |c_R|     (R: the other axes; Cauchy-Schwarz)
 * so a row can only be as near as `best` where  q_K.c_K + |q_R| |c_R| - |c|^2 / 2  >=  (|q|^2 - best) / 2.
 * What is left is measured in full, from the two vectors themselves. The caller rounds everything to the safe side, so
 * the row found is the nearest one in float32, and of equally near ones the first.
 *
 * Shapes: P patches, M rows, C channels, K1 = K + 1, B = 48 rows a block (M is padded to whole blocks).
 *   projected  (P K1)         q_K and |q_R|
 *   features   (P C)          q
 *   packed     (M/B K1 B)     c_K and |c_R|, a block's rows side by side
 *   bias       (M)            -|c|^2 / 2; -infinity for padding
 *   core       (rows C)       c
 *   threshold  (P)            |q|^2 / 2, less what rounding may have done
 *   bounds     (8 M)          scratch, of each thread its own
 *   row        (P)            out: the nearest
 *   distance   (P)            out: the squared distance to it; not a number where the features are none
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 48, LANES = 16 };

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32), aligned(4)));

struct bank {
    int32_t rows, padded, channels, k1;
    const float *packed, *bias, *core;
};

struct patch {
    const float *features;
    float threshold, best;
    int32_t row;
};

/* In 16 sums, whatever the vectors are, so that a distance depends on its two vectors alone. */
static inline __attribute__((always_inline)) float distance_sq(const float *q, const float *c, int32_t channels) {
    v16 sums = {0};
    int32_t at = 0;
    for (; at + LANES <= channels; at += LANES) {
        v16 difference = *(const v16 *)(q + at) - *(const v16 *)(c + at);
        sums += difference * difference;
    }
    for (int32_t half = LANES / 2; half > 0; half /= 2)
        for (int32_t lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    float total = sums[0];
    for (; at < channels; at++) total += (q[at] - c[at]) * (q[at] - c[at]);
    return total;
}

static inline __attribute__((always_inline)) void measure(struct patch *patch, const struct bank *bank, int32_t row) {
    if (row >= bank->rows) return;
    float found = distance_sq(patch->features, bank->core + (size_t)row * bank->channels, bank->channels);
    if (found < patch->best || (found == patch->best && row < patch->row)) {
        patch->best = found;
        patch->row = row;
    }
}

static inline __attribute__((always_inline)) float bar(const struct patch *patch) {
    return patch->threshold - 0.5f * patch->best;
}

#define EACH(COUNT, NAME) _Pragma("GCC unroll 8") for (int32_t NAME = 0; NAME < (COUNT); NAME++)

/* One body for each width of vectors: TILE patches against the rows of a block, SPAN vectors of them at a time.
 * First the bounds of all rows, kept in `bounds` (TILE M); then each patch measures the row of its highest bound, which
 * is mostly the nearest already, and whatever rows still reach its bar. */
#define SEARCH(NAME, TARGET, VECTOR, WIDTH, SPAN, TILE, ABOVE, HIGHER)                                                  \
    TARGET static void NAME(const struct bank *bank, struct patch *patches, const float *projected, float *bounds,      \
                            int32_t count) {                                                                            \
        const int32_t k1 = bank->k1;                                                                                    \
        VECTOR tops[TILE];                                                                                              \
        for (int32_t p = 0; p < TILE; p++) tops[p] = (VECTOR){0} - INFINITY;                                            \
        for (int32_t first = 0; first < bank->padded; first += WIDTH * SPAN) {                                          \
            const float *block = bank->packed + (size_t)(first / BLOCK * BLOCK) * k1 + first % BLOCK;                   \
            VECTOR sums[TILE][SPAN]; /* in registers: no index of it is a variable's */                                 \
            EACH(SPAN, s) EACH(TILE, p) sums[p][s] = *(const VECTOR *)(bank->bias + first + s * WIDTH);                 \
            for (int32_t k = 0; k < k1; k++) {                                                                          \
                VECTOR values[SPAN];                                                                                    \
                EACH(SPAN, s) values[s] = *(const VECTOR *)(block + (size_t)k * BLOCK + s * WIDTH);                     \
                EACH(TILE, p) {                                                                                         \
                    const float q = projected[(size_t)p * k1 + k];                                                      \
                    EACH(SPAN, s) sums[p][s] += values[s] * q;                                                          \
                }                                                                                                       \
            }                                                                                                           \
            EACH(TILE, p) EACH(SPAN, s) {                                                                               \
                *(VECTOR *)(bounds + (size_t)p * bank->padded + first + s * WIDTH) = sums[p][s];                        \
                tops[p] = HIGHER(sums[p][s], tops[p]);                                                                  \
            }                                                                                                           \
        }                                                                                                               \
        for (int32_t p = 0; p < count; p++) {                                                                           \
            const float *row_bounds = bounds + (size_t)p * bank->padded;                                                \
            float level = tops[p][0];                                                                                   \
            for (int32_t lane = 1; lane < WIDTH; lane++) level = tops[p][lane] > level ? tops[p][lane] : level;         \
            for (int32_t pass = 0; pass < 2; pass++) {                                                                  \
                for (int32_t first = 0; first < bank->padded; first += WIDTH)                                           \
                    for (uint32_t left = ABOVE(*(const VECTOR *)(row_bounds + first), level); left; left &= left - 1)   \
                        measure(&patches[p], bank, first + __builtin_ctz(left));                                        \
                level = bar(&patches[p]);                                                                               \
            }                                                                                                           \
        }                                                                                                               \
    }

static inline __attribute__((always_inline)) uint32_t lanes_above(v8 values, float bound) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 8; lane++) bits |= (uint32_t)(values[lane] >= bound) << lane;
    return bits;
}

static inline __attribute__((always_inline)) v8 lanes_higher(v8 one, v8 other) {
    for (int lane = 0; lane < 8; lane++) one[lane] = one[lane] > other[lane] ? one[lane] : other[lane];
    return one;
}

enum { MOST_TILE = 8, NARROW_TILE = 4 };

SEARCH(search_anywhere, , v8, 8, 3, NARROW_TILE, lanes_above, lanes_higher)

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,fma,prefer-vector-width=512")))
AVX2 static inline __attribute__((always_inline)) uint32_t above_avx2(v8 values, float bound) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(bound), _CMP_GE_OQ));
}
AVX512 static inline __attribute__((always_inline)) uint32_t above_avx512(v16 values, float bound) {
    return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(bound), _CMP_GE_OQ);
}
AVX2 static inline __attribute__((always_inline)) v8 higher_avx2(v8 one, v8 other) {
    return (v8)_mm256_max_ps((__m256)one, (__m256)other);
}
AVX512 static inline __attribute__((always_inline)) v16 higher_avx512(v16 one, v16 other) {
    return (v16)_mm512_max_ps((__m512)one, (__m512)other);
}
SEARCH(search_avx2, AVX2, v8, 8, 3, NARROW_TILE, above_avx2, higher_avx2)
SEARCH(search_avx512, AVX512, v16, 16, 3, MOST_TILE, above_avx512, higher_avx512)
#endif

/* Patches from `begin` to `end`; several threads may share a bank, each with patches of its own. */
void inspectd_nearest(
    int32_t begin, int32_t end, int32_t rows, int32_t padded, int32_t channels, int32_t k1, const float *projected,
    const float *features, const float *packed, const float *bias, const float *core, const float *threshold,
    float *bounds, int32_t *row, float *distance) {
    const struct bank bank = {rows, padded, channels, k1, packed, bias, core};
    void (*search)(const struct bank *, struct patch *, const float *, float *, int32_t) = search_anywhere;
    int32_t tile = NARROW_TILE;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        search = search_avx512;
        tile = MOST_TILE;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        search = search_avx2;
    }
#endif
    for (int32_t at = begin; at < end; at += tile) {
        struct patch patches[MOST_TILE];
        const int32_t count = end - at < tile ? end - at : tile;
        for (int32_t p = 0; p < count; p++) {
            const float *q = features + (size_t)(at + p) * channels;
            patches[p] = (struct patch){q, threshold[at + p], distance_sq(q, core, channels), 0};
        }
        search(&bank, patches, projected + (size_t)at * k1, bounds, count);
        for (int32_t p = 0; p < count; p++) {
            row[at + p] = patches[p].row;
            distance[at + p] = patches[p].best;
        }
    }
}
