/* The nearest row of a memory bank for each patch, by squared L2, exact, on a CPU.
 *
 * Reference: tests/reference.py, distances_sq. Called by daemon/inspection/backend/pruned.py, which packs the bank.
 *
 * Most rows are ruled out by a bound that costs K + 1 multiplications in place of C: in a basis whose first K axes hold
 * most of the bank's spread,
 *     q.c <= q_K.c_K + |q_R| |c_R|     (q, c: less the bank's mean; R: the other axes; Cauchy-Schwarz)
 * so a row can only be as near as `best` where  q_K.c_K + |q_R| |c_R| - |c|^2 / 2  >=  (|q|^2 - best) / 2.
 * What is left is measured in full, from the two vectors themselves. Everything is rounded to the safe side by `slack`,
 * so the row found is the nearest one in float32, and of equally near ones the first.
 *
 * Shapes: P patches, M rows (padded to whole blocks and to AMX's 32), C channels, K axes, K1 = K + 1, B = 48 rows a block.
 *   features   (P C)          the patches as the network leaves them
 *   core       (rows C)       the rows
 *   centre     (C)            the bank's mean
 *   axes       (C K)          the bank's widest principal axes; columns of 0 where it has fewer
 *   packed     (M/B K1 B)     c_K and |c_R|, a block's rows side by side
 *   halves                    the same in bf16, where AMX is used: nearest_amx.c
 *   bias       (M)            -|c|^2 / 2; far below any other for padding
 *   slack                     how far a computed product may be off, as a share of |q| |c|
 *   longest                   the largest |c|
 *   bounds     (8 M + SKEW)   scratch, of each thread its own
 *   row        (P)            out: the nearest
 *   distance   (P)            out: the squared distance to it; not a number where the features are none
 */
#include "nearest_cpu.h"

#include <math.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));

/* The patch's last coordinate, the length of what its axes do not hold, and half its length: |q|^2 / 2 less what
 * rounding may have done to any bound. Features that are no numbers make both none, and no row will reach its bar. */
static inline __attribute__((always_inline)) void finish(struct patch *patch, const struct bank *bank,
                                                         float *projected) {
    const float length_sq = distance_sq(patch->features, bank->centre, bank->channels);
    const float reach = sqrtf(length_sq) + bank->longest;
    float left_sq = length_sq;
    for (int32_t k = 0; k < AXES; k++) left_sq -= projected[k] * projected[k];
    /* Each coordinate may be off by C roundings of |q|, all of them by sqrt(K) times that, and it counts twice here. */
    projected[AXES] = sqrtf((left_sq > 0 ? left_sq : 0) + 7 * bank->slack * length_sq);
    patch->threshold = 0.5f * length_sq - bank->slack * reach * reach - 1e-35f; /* what AMX flushes to 0 */
}

#define EACH(COUNT, NAME) _Pragma("GCC unroll 8") for (int32_t NAME = 0; NAME < (COUNT); NAME++)

/* One body for each width of vectors: TILE patches against the rows of a block, SPAN vectors of them at a time.
 * project: the patches in the bank's axes. bound: the bounds of all rows. settle: each patch measures the row of its
 * highest bound, which is mostly the nearest already, and whatever rows still reach the bar that this one sets. */
#define FORM(NAME, TARGET, VECTOR, WIDTH, SPAN, TILE, ABOVE, HIGHER)                                                    \
    TARGET static void project_##NAME(const struct bank *bank, struct patch *patches, float *projected) {              \
        for (int32_t first = 0; first < AXES; first += WIDTH * SPAN) {                                                  \
            VECTOR sums[TILE][SPAN] = {0}; /* in registers: no index of it is a variable's */                           \
            for (int32_t c = 0; c < bank->channels; c++) {                                                              \
                VECTOR values[SPAN];                                                                                    \
                EACH(SPAN, s) values[s] = *(const VECTOR *)(bank->axes + (size_t)c * AXES + first + s * WIDTH);         \
                EACH(TILE, p) {                                                                                         \
                    const float q = patches[p].features[c] - bank->centre[c];                                           \
                    EACH(SPAN, s) sums[p][s] += values[s] * q;                                                          \
                }                                                                                                       \
            }                                                                                                           \
            EACH(TILE, p) EACH(SPAN, s) *(VECTOR *)(projected + p * K1 + first + s * WIDTH) = sums[p][s];               \
        }                                                                                                               \
        for (int32_t p = 0; p < TILE; p++) finish(&patches[p], bank, projected + p * K1);                               \
    }                                                                                                                   \
    TARGET static void bound_##NAME(const struct bank *bank, const float *projected, float *bounds) {                  \
        for (int32_t first = 0; first < bank->padded; first += WIDTH * SPAN) {                                          \
            const float *block = bank->packed + (size_t)(first / BLOCK * BLOCK) * K1 + first % BLOCK;                   \
            VECTOR sums[TILE][SPAN];                                                                                    \
            EACH(SPAN, s) EACH(TILE, p) sums[p][s] = *(const VECTOR *)(bank->bias + first + s * WIDTH);                 \
            for (int32_t k = 0; k < K1; k++) {                                                                          \
                VECTOR values[SPAN];                                                                                    \
                EACH(SPAN, s) values[s] = *(const VECTOR *)(block + (size_t)k * BLOCK + s * WIDTH);                     \
                EACH(TILE, p) {                                                                                         \
                    const float q = projected[p * K1 + k];                                                              \
                    EACH(SPAN, s) sums[p][s] += values[s] * q;                                                          \
                }                                                                                                       \
            }                                                                                                           \
            EACH(TILE, p) EACH(SPAN, s)                                                                                 \
                *(VECTOR *)(bounds + (size_t)p * (bank->padded + SKEW) + first + s * WIDTH) = sums[p][s];               \
        }                                                                                                               \
    }                                                                                                                   \
    TARGET static void settle_##NAME(const struct bank *bank, struct patch *patches, const float *projected,           \
                                     const float *bounds, int32_t count) {                                              \
        (void)projected;                                                                                                \
        for (int32_t p = 0; p < count; p++, bounds += bank->padded + SKEW) {                                            \
            VECTOR tops = *(const VECTOR *)bounds;                                                                      \
            for (int32_t first = WIDTH; first < bank->padded; first += WIDTH)                                           \
                tops = HIGHER(*(const VECTOR *)(bounds + first), tops);                                                 \
            float level = tops[0];                                                                                      \
            for (int32_t lane = 1; lane < WIDTH; lane++) level = tops[lane] > level ? tops[lane] : level;               \
            measure_first(&patches[p], bank);                                                                           \
            for (int32_t pass = 0; pass < 2; pass++) {                                                                  \
                for (int32_t first = 0; first < bank->padded; first += WIDTH)                                           \
                    for (uint32_t left = ABOVE(*(const VECTOR *)(bounds + first), level); left; left &= left - 1)       \
                        measure(&patches[p], bank, first + __builtin_ctz(left));                                        \
                level = bar(&patches[p]);                                                                               \
            }                                                                                                           \
        }                                                                                                               \
    }

#if defined(__x86_64__)
static inline __attribute__((always_inline)) uint32_t above_anywhere(v4 values, float bound) {
    return (uint32_t)_mm_movemask_ps(_mm_cmpge_ps((__m128)values, _mm_set1_ps(bound)));
}
#else
static inline __attribute__((always_inline)) uint32_t above_anywhere(v4 values, float bound) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 4; lane++) bits |= (uint32_t)(values[lane] >= bound) << lane;
    return bits;
}
#endif

static inline __attribute__((always_inline)) v4 higher_anywhere(v4 one, v4 other) {
    for (int lane = 0; lane < 4; lane++) one[lane] = one[lane] > other[lane] ? one[lane] : other[lane];
    return one;
}

FORM(anywhere, , v4, 4, 3, 4, above_anywhere, higher_anywhere)

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
FORM(avx2, AVX2, v8, 8, 3, 4, above_avx2, higher_avx2)
FORM(avx512, AVX512, v16, 16, 3, 8, above_avx512, higher_avx512)
#endif

/* In the order of pruned.py's FORMS. `tile` patches are projected at a time, `wide` bounded. */
static const struct form {
    int32_t tile, wide;
    void (*project)(const struct bank *, struct patch *, float *);
    void (*bound)(const struct bank *, const float *, float *);
    void (*settle)(const struct bank *, struct patch *, const float *, const float *, int32_t);
} FORMS[] = {
    {4, 4, project_anywhere, bound_anywhere, settle_anywhere},
#if defined(__x86_64__)
    {4, 4, project_avx2, bound_avx2, settle_avx2},
    {8, 8, project_avx512, bound_avx512, settle_avx512},
    {8, MOST_TILE, project_avx512, bound_amx, settle_amx},
#endif
};

/* pruned.py asks before it calls anything else: a library left over from another version takes other arguments. */
int32_t inspectd_nearest_interface(void) { return INTERFACE; }

/* The number of forms that this machine can run; each needs more than the one before. */
int32_t inspectd_nearest_forms(void) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    if (!__builtin_cpu_supports("avx512f")) return 2;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && may_use_amx() ? 4 : 3;
#else
    return 1;
#endif
}

/* Patches from `begin` to `end`; several threads may share a bank, each with patches of its own. */
void inspectd_nearest(const struct bank *bank, int32_t begin, int32_t end, const float *features, float *bounds,
                      int32_t *row, float *distance) {
    const struct form *form = &FORMS[bank->form];
    for (int32_t at = begin; at < end; at += form->wide) {
        struct patch patches[MOST_TILE];
        float projected[MOST_TILE * K1];
        const int32_t count = end - at < form->wide ? end - at : form->wide;
        for (int32_t p = 0; p < form->wide; p++) /* an incomplete tile is filled up with its last patch */
            patches[p].features = features + (size_t)(at + (p < count ? p : count - 1)) * bank->channels;
        for (int32_t p = 0; p < form->wide; p += form->tile) form->project(bank, patches + p, projected + p * K1);
        form->bound(bank, projected, bounds);
        form->settle(bank, patches, projected, bounds, count);
        for (int32_t p = 0; p < count; p++) {
            row[at + p] = patches[p].row;
            distance[at + p] = patches[p].best;
        }
    }
}
