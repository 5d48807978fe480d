/* What the forms of the CPU's search share: nearest_cpu.c says what is computed, daemon/inspection/backend/pruned.py
 * packs the bank. */
#include <stdint.h>

#include <stddef.h>

/* MOST_TILE patches are searched at a time at most. SKEW: a row of bounds begins elsewhere in the cache than the row
 * above, also where M is a power of two. */
enum { AXES = 48, K1 = AXES + 1, BLOCK = 48, LANES = 16, MOST_TILE = 32, SKEW = 16 };

enum { INTERFACE = 2 }; /* as pruned.py's; another one with every change of struct bank or of what it points to */

struct bank { /* as pruned.py's _Bank */
    int32_t rows, padded, channels, form;
    float slack, longest;
    const float *centre, *axes, *packed, *bias, *core;
    const uint16_t *halves;
};

struct patch {
    const float *features;
    float threshold, best;
    int32_t row;
};

typedef float v16 __attribute__((vector_size(64), aligned(4)));

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

/* Where each patch begins: at the first row. */
static inline __attribute__((always_inline)) void measure_first(struct patch *patch, const struct bank *bank) {
    patch->row = 0;
    patch->best = distance_sq(patch->features, bank->core, bank->channels);
}

/* What a row's bound must reach to be as near as the best one so far. */
static inline __attribute__((always_inline)) float bar(const struct patch *patch) {
    return patch->threshold - 0.5f * patch->best;
}

int32_t may_use_amx(void);
void bound_amx(const struct bank *bank, const float *projected, float *tops);
void settle_amx(const struct bank *bank, struct patch *patches, const float *projected, const float *tops,
                int32_t count);
