/* Codes to rows of floats. */
#include "tiles.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "avx512.h"

/* 16 x 16 words of four bytes, transposed. */
INLINE void transpose(__m512i rows[16]) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        half[i] = _mm512_unpacklo_epi64(a, c);
        half[i + 1] = _mm512_unpackhi_epi64(a, c);
        half[i + 2] = _mm512_unpacklo_epi64(b, d);
        half[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) { /* half[4k + i], lane l: row 4l + i, columns 4k..4k+3 */
        __m512i a = _mm512_shuffle_i32x4(half[i], half[4 + i], 0x88), b = _mm512_shuffle_i32x4(half[i], half[4 + i], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(half[8 + i], half[12 + i], 0x88);
        __m512i d = _mm512_shuffle_i32x4(half[8 + i], half[12 + i], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        rows[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        rows[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

static void decode_tile(const Matrix *m, int64_t tile, uint16_t *out) {
    int64_t rows = m->rows - tile * TILE < TILE ? m->rows - tile * TILE : TILE;
    for (int64_t column = 0; column < m->columns; column += BLOCK) {
        __m512i pairs[16];
        decode_pairs(m, tile, column, pairs);
        transpose(pairs);
        uint16_t *to = out + tile * TILE * m->columns + column;
        for (int64_t r = 0; r < rows; r++) _mm512_storeu_si512(to + r * m->columns, pairs[r]);
    }
}
#else
static void decode_tile(const Matrix *m, int64_t tile, uint16_t *out) {
    float block[BLOCK][TILE];
    int64_t rows = m->rows - tile * TILE < TILE ? m->rows - tile * TILE : TILE;
    for (int64_t column = 0; column < m->columns; column += BLOCK) {
        decode_block(m, tile, column, block);
        for (int64_t r = 0; r < rows; r++) {
            uint16_t *to = out + (tile * TILE + r) * m->columns + column;
            for (int c = 0; c < BLOCK; c++) to[c] = bfloat_of_float(block[c][r]);
        }
    }
}
#endif

/* bfloat16 [rows, columns]. */
void decode_bfloat16(const Matrix *m, uint16_t *out, int threads) {
    int64_t tiles = num_tiles(m);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) decode_tile(m, tile, out);
}

/* float32 [rows, columns]. */
void decode_float32(const Matrix *m, float *out, int threads) {
    int64_t tiles = num_tiles(m);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        float block[BLOCK][TILE];
        int64_t rows = m->rows - tile * TILE < TILE ? m->rows - tile * TILE : TILE;
        for (int64_t column = 0; column < m->columns; column += BLOCK) {
            decode_block(m, tile, column, block);
            for (int64_t r = 0; r < rows; r++)
                for (int c = 0; c < BLOCK; c++) out[(tile * TILE + r) * m->columns + column + c] = block[c][r];
        }
    }
}
