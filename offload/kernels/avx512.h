/* Decoding with AVX-512 and its bfloat16 instructions. Included where the compiler has both. */
#ifndef TILES_AVX512_H
#define TILES_AVX512_H

#include <immintrin.h>

#include "tiles.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 load_halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

INLINE __m512 load_scale(const Matrix *m, const uint8_t *from) {
    return m->half_scales ? load_halves(from) : _mm512_loadu_ps(from);
}

/* Two vectors of 16 columns' weights, one for either parity, as 16 pairs of bfloat16. */
INLINE __m512i pairs_of(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* Byte t of each word, an e4m3, as float16 of 1/256 of its value: [row][parity]. */
INLINE __m512i halves_of_e4m3(__m512i line, int t) {
    __m512i high = t ? line : _mm512_slli_epi16(line, 8);
    return _mm512_and_si512(_mm512_srai_epi16(high, 1), _mm512_set1_epi16((short)0xbf80));
}

/* A scale for each row as one for each [row][parity]: rows 0-7 and 8-15. */
INLINE __m512 twice_low(__m512 rows) {
    return _mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), rows);
}

INLINE __m512 twice_high(__m512 rows) {
    return _mm512_permutexvar_ps(
        _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8), rows);
}

/* 32 columns of a tile as bfloat16, [16 pairs of columns][16 rows][2]: what decode_block gives, rounded to nearest. */
INLINE void decode_pairs(const Matrix *m, int64_t tile, int64_t column, __m512i out[16]) {
    const uint8_t *lines = line_at(m, tile, column), *scales = scales_at(m, tile, column);
    __m512 scale = load_scale(m, scales);
    if (m->kind == INT4) {
        const __m512i nibble = _mm512_set1_epi32(15);
        __m512 minimum = load_halves(scales + 2 * TILE);
        for (int b = 0; b < 4; b++) {
            __m512i line = _mm512_loadu_si512(lines + b * LINE);
            for (int t = 0; t < 4; t++) {
                __m512i even = _mm512_and_si512(_mm512_srli_epi32(line, 4 * t), nibble);
                __m512i odd = _mm512_and_si512(_mm512_srli_epi32(line, 16 + 4 * t), nibble);
                out[4 * b + t] = pairs_of(_mm512_fmadd_ps(_mm512_cvtepi32_ps(even), scale, minimum),
                                          _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), scale, minimum));
            }
        }
    } else if (m->kind == INT8) {
        for (int b = 0; b < 8; b++) {
            __m512i line = _mm512_xor_si512(_mm512_loadu_si512(lines + b * LINE), _mm512_set1_epi8((char)0x80));
            for (int t = 0; t < 2; t++) {
                __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * t), 24);
                __m512i odd = _mm512_srai_epi32(_mm512_slli_epi32(line, 8 - 8 * t), 24);
                out[2 * b + t] = pairs_of(_mm512_mul_ps(_mm512_cvtepi32_ps(even), scale),
                                          _mm512_mul_ps(_mm512_cvtepi32_ps(odd), scale));
            }
        }
    } else {
        scale = _mm512_mul_ps(scale, _mm512_set1_ps(256));
        __m512 low = twice_low(scale), high = twice_high(scale);
        for (int b = 0; b < 8; b++) {
            __m512i line = _mm512_loadu_si512(lines + b * LINE);
            for (int t = 0; t < 2; t++) {
                __m512i halves = halves_of_e4m3(line, t);
                __m512 first = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
                __m512 second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
                out[2 * b + t] =
                    (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, high), _mm512_mul_ps(first, low));
            }
        }
    }
}

/* 16 sums, a bias (or NULL) added, as bfloat16 of the first `rows` rows. */
INLINE void store_rows(uint16_t *to, __m512 sums, const uint16_t *bias, int64_t rows) {
    __mmask16 mask = rows >= TILE ? 0xffff : (__mmask16)((1u << rows) - 1);
    if (bias) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias));
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

#endif
