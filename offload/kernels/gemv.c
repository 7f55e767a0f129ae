/* A few rows of x times an encoded matrix, from the codes alone: memory bound.
 *
 * int4 and int8: a nibble q under the bits 0x4300 is the bfloat16 128 + q, exactly. So 32 words of a line, masked, are
 * the operand of a bfloat16 dot product, and the sum over a group is  S = sum((128 + q) x).  With X = sum(x) of the
 * group, known for each row of x beforehand:
 *     int4    sum(w x) = scale * S + (minimum - 128 * scale) * X
 *     int8    u = q + 128 = 16 h + l, so  sum(w x) = scale * (16 S_h + S_l - (17 + 1) * 128 * X)
 * From two rows of x on, an int8 becomes a float32 once, and so does an fp8, through float16, which holds every e4m3 of
 * 1/256 of its value.
 */
#include "tiles.h"

enum { MOST_ROWS = 8 };

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "avx512.h"

#define UNROLL _Pragma("GCC unroll 16")

/* A nibble of each word under the bits of 128. */
#define SHIFTED(line, bits) \
    ((__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi32(line, bits), _mm512_set1_epi16(15), \
                                         _mm512_set1_epi16(0x4300), 0xea))

INLINE __m512bh pair_at(const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

INLINE __m512 total_of(const __m512 *parts, int count) {
    __m512 total = parts[0];
    for (int i = 1; i < count; i++) total = _mm512_add_ps(total, parts[i]);
    return total;
}

/* M rows of x, TILES tiles, PARTS independent sums of each: constants after inlining. */
INLINE void rows_int4(const Matrix *m, const uint16_t *x, const float *sums, int64_t tile, __m512 *y, const int M,
                      const int TILES, const int PARTS) {
    int64_t groups = m->columns / m->group;
    UNROLL for (int i = 0; i < M * TILES; i++) y[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512 acc[16];
        UNROLL for (int i = 0; i < M * TILES * PARTS; i++) acc[i] = _mm512_setzero_ps();
        const uint8_t *lines[2];
        UNROLL for (int s = 0; s < TILES; s++) lines[s] = line_at(m, tile + s, g * m->group);
        const uint16_t *at = x + g * m->group;
        for (int64_t b = 0; b < m->group / 8; b++, at += 8) {
            __m512i line[2];
            UNROLL for (int s = 0; s < TILES; s++) {
                line[s] = _mm512_loadu_si512(lines[s] + b * LINE);
                _mm_prefetch(lines[s] + b * LINE + 1536, _MM_HINT_T0);
            }
            UNROLL for (int t = 0; t < 4; t++) {
                UNROLL for (int s = 0; s < TILES; s++) {
                    __m512bh w = SHIFTED(line[s], 4 * t);
                    UNROLL for (int i = 0; i < M; i++) {
                        __m512 *to = &acc[(s * M + i) * PARTS + t % PARTS];
                        *to = _mm512_dpbf16_ps(*to, w, pair_at(at + i * m->columns + 2 * t));
                    }
                }
            }
        }
        UNROLL for (int s = 0; s < TILES; s++) {
            const uint8_t *scales = scales_at(m, tile + s, g * m->group);
            __m512 scale = load_halves(scales);
            __m512 offset = _mm512_fnmadd_ps(scale, _mm512_set1_ps(128), load_halves(scales + 2 * TILE));
            UNROLL for (int i = 0; i < M; i++) {
                __m512 *to = &y[s * M + i];
                *to = _mm512_fmadd_ps(scale, total_of(&acc[(s * M + i) * PARTS], PARTS), *to);
                *to = _mm512_fmadd_ps(offset, _mm512_set1_ps(sums[i * groups + g]), *to);
            }
        }
    }
}

/* The scale of 32 columns of int8: one that belongs to the whole row is applied at the end. */
INLINE __m512 scale_of_block(const Matrix *m, int64_t tile, int64_t column) {
    return m->half_scales ? load_halves(scales_at(m, tile, column)) : _mm512_set1_ps(1);
}

INLINE void apply_row_scales(const Matrix *m, int64_t tile, __m512 *y, const int count) {
    if (m->half_scales) return;
    __m512 scale = _mm512_loadu_ps(scales_at(m, tile, 0));
    UNROLL for (int i = 0; i < count; i++) y[i] = _mm512_mul_ps(y[i], scale);
}

INLINE void rows_int8(const Matrix *m, const uint16_t *x, const float *sums, int64_t tile, __m512 *y, const int M,
                      const int TILES) {
    int64_t blocks = m->columns / BLOCK;
    UNROLL for (int i = 0; i < M * TILES; i++) y[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < blocks; g++) {
        __m512 low[16], high[16];
        UNROLL for (int i = 0; i < M * TILES; i++) low[i] = high[i] = _mm512_setzero_ps();
        const uint8_t *lines[2];
        UNROLL for (int s = 0; s < TILES; s++) lines[s] = line_at(m, tile + s, g * BLOCK);
        const uint16_t *at = x + g * BLOCK;
        for (int b = 0; b < BLOCK / 4; b++, at += 4) {
            __m512i line[2];
            UNROLL for (int s = 0; s < TILES; s++) {
                line[s] = _mm512_loadu_si512(lines[s] + b * LINE);
                _mm_prefetch(lines[s] + b * LINE + 1536, _MM_HINT_T0);
            }
            UNROLL for (int t = 0; t < 2; t++) {
                UNROLL for (int s = 0; s < TILES; s++) {
                    __m512bh l = SHIFTED(line[s], 8 * t), h = SHIFTED(line[s], 8 * t + 4);
                    UNROLL for (int i = 0; i < M; i++) {
                        __m512bh pair = pair_at(at + i * m->columns + 2 * t);
                        low[s * M + i] = _mm512_dpbf16_ps(low[s * M + i], l, pair);
                        high[s * M + i] = _mm512_dpbf16_ps(high[s * M + i], h, pair);
                    }
                }
            }
        }
        UNROLL for (int s = 0; s < TILES; s++) {
            __m512 scale = scale_of_block(m, tile + s, g * BLOCK);
            UNROLL for (int i = 0; i < M; i++) {
                __m512 sum = _mm512_fmadd_ps(high[s * M + i], _mm512_set1_ps(16), low[s * M + i]);
                sum = _mm512_fnmadd_ps(_mm512_set1_ps(18 * 128), _mm512_set1_ps(sums[i * blocks + g]), sum);
                y[s * M + i] = _mm512_fmadd_ps(scale, sum, y[s * M + i]);
            }
        }
    }
    UNROLL for (int s = 0; s < TILES; s++) apply_row_scales(m, tile + s, y + s * M, M);
}

/* x as float32, sums as before. Codes are q + 128 here, too. */
INLINE void rows_wide_int8(const Matrix *m, const float *x, const float *sums, int64_t tile, __m512 *y, const int M,
                           const int TILES) {
    const __m512i byte = _mm512_set1_epi32(255);
    int64_t blocks = m->columns / BLOCK;
    UNROLL for (int i = 0; i < M * TILES; i++) y[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < blocks; g++) {
        __m512 even[8], odd[8];
        UNROLL for (int i = 0; i < M * TILES; i++) even[i] = odd[i] = _mm512_setzero_ps();
        const uint8_t *lines[2];
        UNROLL for (int s = 0; s < TILES; s++) lines[s] = line_at(m, tile + s, g * BLOCK);
        const float *at = x + g * BLOCK;
        for (int b = 0; b < BLOCK / 4; b++, at += 4) {
            UNROLL for (int s = 0; s < TILES; s++) {
                __m512i line = _mm512_loadu_si512(lines[s] + b * LINE);
                _mm_prefetch(lines[s] + b * LINE + 1536, _MM_HINT_T0);
                UNROLL for (int t = 0; t < 2; t++) {
                    __m512i low = _mm512_and_si512(_mm512_srli_epi32(line, 8 * t), byte);
                    __m512i high = _mm512_and_si512(_mm512_srli_epi32(line, 16 + 8 * t), byte);
                    __m512 w0 = _mm512_cvtepi32_ps(low), w1 = _mm512_cvtepi32_ps(high);
                    UNROLL for (int i = 0; i < M; i++) {
                        const float *pair = at + i * m->columns + 2 * t;
                        even[s * M + i] = _mm512_fmadd_ps(w0, _mm512_set1_ps(pair[0]), even[s * M + i]);
                        odd[s * M + i] = _mm512_fmadd_ps(w1, _mm512_set1_ps(pair[1]), odd[s * M + i]);
                    }
                }
            }
        }
        UNROLL for (int s = 0; s < TILES; s++) {
            __m512 scale = scale_of_block(m, tile + s, g * BLOCK);
            UNROLL for (int i = 0; i < M; i++) {
                __m512 sum = _mm512_add_ps(even[s * M + i], odd[s * M + i]);
                sum = _mm512_fnmadd_ps(_mm512_set1_ps(128), _mm512_set1_ps(sums[i * blocks + g]), sum);
                y[s * M + i] = _mm512_fmadd_ps(scale, sum, y[s * M + i]);
            }
        }
    }
    UNROLL for (int s = 0; s < TILES; s++) apply_row_scales(m, tile + s, y + s * M, M);
}

/* x as float32 here. */
INLINE void rows_fp8(const Matrix *m, const float *x, int64_t tile, __m512 *y, const int M) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    __m512 first[MOST_ROWS], second[MOST_ROWS];
    UNROLL for (int i = 0; i < M; i++) first[i] = second[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < m->columns / m->group; g++) {
        __m512 low[MOST_ROWS], high[MOST_ROWS];
        UNROLL for (int i = 0; i < M; i++) low[i] = high[i] = _mm512_setzero_ps();
        const uint8_t *lines = line_at(m, tile, g * m->group);
        const float *at = x + g * m->group;
        for (int64_t b = 0; b < m->group / 4; b++, at += 4) {
            __m512i line = _mm512_loadu_si512(lines + b * LINE);
            _mm_prefetch(lines + b * LINE + 1536, _MM_HINT_T0);
            UNROLL for (int t = 0; t < 2; t++) {
                __m512i halves = halves_of_e4m3(line, t);
                __m512 upper = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
                __m512 lower = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
                UNROLL for (int i = 0; i < M; i++) {
                    double both;
                    memcpy(&both, at + i * m->columns + 2 * t, 8);
                    __m512 pair = _mm512_castpd_ps(_mm512_set1_pd(both));
                    low[i] = _mm512_fmadd_ps(upper, pair, low[i]);
                    high[i] = _mm512_fmadd_ps(lower, pair, high[i]);
                }
            }
        }
        __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales_at(m, tile, g * m->group)), _mm512_set1_ps(256));
        UNROLL for (int i = 0; i < M; i++) {
            first[i] = _mm512_fmadd_ps(twice_low(scale), low[i], first[i]);
            second[i] = _mm512_fmadd_ps(twice_high(scale), high[i], second[i]);
        }
    }
    UNROLL for (int i = 0; i < M; i++) {
        y[i] = _mm512_add_ps(_mm512_permutex2var_ps(first[i], even, second[i]),
                             _mm512_permutex2var_ps(first[i], odd, second[i]));
    }
}

/* One tile, or two, times M rows of x. */
INLINE void some_rows(const Matrix *m, const uint16_t *x, const float *wide, const float *sums, const uint16_t *bias,
                      uint16_t *out, int64_t tile, const int M, const int TILES, const int PARTS) {
    __m512 y[16];
    if (m->kind == INT4) {
        rows_int4(m, x, sums, tile, y, M, TILES, PARTS);
    } else if (m->kind == INT8 && M == 1) {
        rows_int8(m, x, sums, tile, y, M, TILES);
    } else if (m->kind == INT8) {
        rows_wide_int8(m, wide, sums, tile, y, M, TILES);
    } else {
        UNROLL for (int s = 0; s < TILES; s++) rows_fp8(m, wide, tile + s, y + s * M, M);
    }
    UNROLL for (int s = 0; s < TILES; s++) UNROLL for (int i = 0; i < M; i++) {
        int64_t row = (tile + s) * TILE;
        store_rows(out + i * m->rows + row, y[s * M + i], bias ? bias + row : 0, m->rows - row);
    }
}

#define CASE(M, TILES, PARTS) \
    case M: \
        if (TILES == 2 && tiles == 1) \
            some_rows(m, x, wide, sums, bias, out, tile, M, 1, PARTS); \
        else \
            some_rows(m, x, wide, sums, bias, out, tile, M, TILES, PARTS); \
        break;

enum { TILES_AT_ONCE = 2 };

static void tiles_times_rows(const Matrix *m, const uint16_t *x, int num_x, const float *wide, const float *sums,
                             const uint16_t *bias, uint16_t *out, int64_t first, int64_t tiles) {
    int64_t tile = first;
    switch (num_x) {
        CASE(1, 2, 4)
        CASE(2, 2, 2)
        CASE(3, 2, 1)
        CASE(4, 2, 1)
        default:
            for (; tile < first + tiles; tile++) switch (num_x) {
                    CASE(5, 1, 1)
                    CASE(6, 1, 1)
                    CASE(7, 1, 1)
                    CASE(8, 1, 1)
                }
    }
}
#else
enum { TILES_AT_ONCE = 1 };

static void tiles_times_rows(const Matrix *m, const uint16_t *x, int num_x, const float *wide, const float *sums,
                             const uint16_t *bias, uint16_t *out, int64_t tile, int64_t tiles) {
    float y[MOST_ROWS][TILE] = {{0}}, block[BLOCK][TILE];
    for (int64_t column = 0; column < m->columns; column += BLOCK) {
        decode_block(m, tile, column, block);
        for (int i = 0; i < num_x; i++)
            for (int c = 0; c < BLOCK; c++) {
                float factor = float_of_bfloat(x[i * m->columns + column + c]);
                for (int r = 0; r < TILE; r++) y[i][r] += block[c][r] * factor;
            }
    }
    for (int i = 0; i < num_x; i++)
        for (int r = 0; r < TILE && tile * TILE + r < m->rows; r++) {
            int64_t row = tile * TILE + r;
            float sum = bias ? y[i][r] + float_of_bfloat(bias[row]) : y[i][r];
            out[i * m->rows + row] = bfloat_of_float(sum);
        }
    (void)wide, (void)sums, (void)tiles;
}
#endif

/* A row of x as float32, and the sums of its parts of `width` columns. */
static void prepare(const uint16_t *x, int64_t columns, int64_t width, float *wide, float *sums) {
    for (int64_t c = 0; c < columns; c++) wide[c] = float_of_bfloat(x[c]);
    for (int64_t first = 0; first < columns; first += width) {
        float lanes[TILE] = {0}, sum = 0;
        for (int64_t c = 0; c < width; c += TILE)
            for (int l = 0; l < TILE; l++) lanes[l] += wide[first + c + l];
        for (int l = 0; l < TILE; l++) sum += lanes[l];
        sums[first / width] = sum;
    }
}

/* out [num_x, rows] = x [num_x, columns] times the matrix, plus bias [rows] or NULL; all bfloat16, num_x at most 8.
 * scratch: num_x * (columns + columns / 32) floats. Every tile is summed by one thread: the bits do not depend on
 * `threads`. */
void few_rows(const Matrix *m, const uint16_t *x, int num_x, const uint16_t *bias, uint16_t *out, float *scratch,
              int threads) {
    int64_t width = m->kind == INT4 ? m->group : BLOCK, tiles = num_tiles(m);
    float *sums = scratch + num_x * m->columns;
    for (int64_t i = 0; i < num_x; i++)
        prepare(x + i * m->columns, m->columns, width, scratch + i * m->columns, sums + i * (m->columns / width));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t tile = 0; tile < tiles; tile += TILES_AT_ONCE)
        tiles_times_rows(m, x, num_x, scratch, sums, bias, out, tile,
                         tiles - tile < TILES_AT_ONCE ? tiles - tile : TILES_AT_ONCE);
}
