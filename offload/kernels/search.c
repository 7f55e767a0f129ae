/* int4 groups by least squared error. int4_search.py is the reference and says what is done; the bytes are the same,
 * so every operation and sum here has its order, and is compiled with -ffp-contract=off. 16 rows at once. */
#include "tiles.h"

#ifdef __AVX512F__
#include <immintrin.h>
typedef __m512 Lanes;

static inline Lanes all(float value) { return _mm512_set1_ps(value); }
static inline Lanes least(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
static inline Lanes most(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
/* a where x < y, b elsewhere */
static inline Lanes where_less(Lanes x, Lanes y, Lanes a, Lanes b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
static inline Lanes halved(Lanes x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
typedef float Lanes __attribute__((vector_size(64), may_alias));

static inline Lanes all(float value) { return value - (Lanes){0}; }
static inline Lanes where_less(Lanes x, Lanes y, Lanes a, Lanes b) {
    for (int r = 0; r < TILE; r++) a[r] = x[r] < y[r] ? a[r] : b[r];
    return a;
}
static inline Lanes least(Lanes a, Lanes b) { return where_less(a, b, a, b); }
static inline Lanes most(Lanes a, Lanes b) { return where_less(b, a, a, b); }

/* Rounded to a float16's 11 bits, or to a multiple of 2**-24 below 2**-14. Not beyond 65504. */
static inline Lanes halved(Lanes x) {
    for (int r = 0; r < TILE; r++) {
        uint32_t bits = bits_of_float(x[r]);
        float large = float_of_bits((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
        float size = float_of_bits(bits & 0x7fffffffu);
        float small = (size + 0.5f) - 0.5f; /* 0.5 has steps of 2**-24 */
        x[r] = size < 0x1p-14f ? (bits >> 31 ? -small : small) : large;
    }
    return x;
}
#endif

enum { WIDEST = 128, PARTS = 4, ENDS = 4, REFITS = 2 };
static const double SHRINKS[ENDS] = {-0.02, 0.02, 0.06, 0.1};
static const double LEVELS = 15.0;

typedef struct {
    Lanes scale, minimum, error;
} Fit;

/* + 0: there is one zero. */
static inline Lanes half_of(Lanes x) { return halved(least(most(x, all(-65504.0f)), all(65504.0f))) + all(0); }

static inline Lanes inverse_of(Lanes scale) {
    Lanes one = where_less(all(0), scale, scale, all(1));
    return where_less(all(0), scale, all(1) / one, all(0));
}

/* Clamped first, so that adding 1.5 * 2**23 rounds to the nearest integer, ties to even. */
static inline Lanes code_of(Lanes w, Lanes minimum, Lanes inverse) {
    Lanes code = least(most((w - minimum) * inverse, all(0)), all(15));
    return (code + all(12582912.0f)) - all(12582912.0f);
}

static inline Lanes total_of(const Lanes *parts) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }

static Fit fit_of(const Lanes *w, int group, Lanes scale, Lanes minimum) {
    Lanes inverse = inverse_of(scale), error[PARTS];
    for (int p = 0; p < PARTS; p++) error[p] = all(0);
    for (int c = 0; c < group; c += PARTS)
        for (int p = 0; p < PARTS; p++) {
            Lanes off = w[c + p] - (code_of(w[c + p], minimum, inverse) * scale + minimum);
            error[p] = error[p] + off * off;
        }
    return (Fit){scale, minimum, total_of(error)};
}

/* The fit to the codes that a scale and a minimum give. */
static Fit refit(const Lanes *w, int group, Lanes sum_w, Lanes from_scale, Lanes from_minimum) {
    Lanes inverse = inverse_of(from_scale), q1[PARTS], qq[PARTS], qw[PARTS];
    for (int p = 0; p < PARTS; p++) q1[p] = qq[p] = qw[p] = all(0);
    for (int c = 0; c < group; c += PARTS)
        for (int p = 0; p < PARTS; p++) {
            Lanes q = code_of(w[c + p], from_minimum, inverse);
            q1[p] = q1[p] + q;
            qq[p] = qq[p] + q * q;
            qw[p] = qw[p] + q * w[c + p];
        }
    Lanes sum_q = total_of(q1), sum_qq = total_of(qq), sum_qw = total_of(qw);
    Lanes count = all((float)group);
    Lanes spread = count * sum_qq - sum_q * sum_q, covered = count * sum_qw - sum_q * sum_w;
    Lanes scale = where_less(all(0), spread, covered / most(spread, all(1)), all(0));
    scale = half_of(most(scale, all(0)));
    Lanes minimum = half_of((sum_w - scale * sum_q) * all((float)(1.0 / group)));
    return fit_of(w, group, scale, minimum);
}

static void keep_better(Fit *best, Fit other) {
    best->scale = where_less(other.error, best->error, other.scale, best->scale);
    best->minimum = where_less(other.error, best->error, other.minimum, best->minimum);
    best->error = where_less(other.error, best->error, other.error, best->error);
}

static Fit search_group(const Lanes *w, int group) {
    Lanes low = w[0], high = w[0], parts[PARTS];
    for (int p = 0; p < PARTS; p++) parts[p] = all(0);
    for (int c = 0; c < group; c++) {
        low = least(low, w[c]);
        high = most(high, w[c]);
        parts[c % PARTS] = parts[c % PARTS] + w[c];
    }
    Lanes sum_w = total_of(parts);
    Lanes width = high - low, level = all((float)(1.0 / LEVELS));
    Fit best = fit_of(w, group, half_of(width * level), half_of(low));
    for (int i = 0; i < ENDS; i++)
        for (int j = 0; j < ENDS; j++) {
            Lanes start = low + all((float)SHRINKS[i]) * width;
            Lanes scale = (width * all((float)(1.0 - SHRINKS[i] - SHRINKS[j]))) * level;
            keep_better(&best, refit(w, group, sum_w, scale, start));
        }
    for (int i = 0; i < REFITS; i++) keep_better(&best, refit(w, group, sum_w, best.scale, best.minimum));
    return best;
}

static uint16_t half_bits(float value) { /* of a value that float16 holds */
    uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
    uint32_t half = magnitude < (113u << 23) ? (uint32_t)(float_of_bits(magnitude) * 0x1p24f)
                                             : (magnitude - (112u << 23)) >> 13;
    return (uint16_t)(half | (bits >> 16 & 0x8000u));
}

/* w float32 [rows, columns] to the codes and scales of its tiles. */
void int4_search(const float *w, int64_t rows, int64_t columns, int64_t group, uint8_t *codes, uint16_t *scales,
                 int threads) {
    int64_t tiles = (rows + TILE - 1) / TILE, groups = columns / group;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t g = 0; g < groups; g++) {
            Lanes lanes[WIDEST];
            float(*values)[TILE] = (float(*)[TILE])lanes;
            for (int r = 0; r < TILE; r++) {
                const float *row = w + (tile * TILE + r) * columns + g * group;
                for (int64_t c = 0; c < group; c++) values[c][r] = tile * TILE + r < rows ? row[c] : 0.0f;
            }
            Fit fit = search_group(lanes, (int)group);
            Lanes inverse = inverse_of(fit.scale);
            for (int64_t c = 0; c < group; c++) lanes[c] = code_of(lanes[c], fit.minimum, inverse);
            uint32_t *words = (uint32_t *)(codes + (tile * columns + g * group) / 8 * LINE);
            for (int64_t b = 0; b < group / 8; b++)
                for (int r = 0; r < TILE; r++) {
                    uint32_t word = 0;
                    for (int t = 0; t < 4; t++)
                        for (int j = 0; j < 2; j++)
                            word |= (uint32_t)(int32_t)values[8 * b + 2 * t + j][r] << (16 * j + 4 * t);
                    words[b * TILE + r] = word;
                }
            uint16_t *to = scales + (tile * groups + g) * 2 * TILE;
            for (int r = 0; r < TILE; r++) {
                to[r] = half_bits(fit.scale[r]);
                to[TILE + r] = half_bits(fit.minimum[r]);
            }
        }
}
