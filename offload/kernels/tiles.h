/* Encoded matrices as partition/encoding.py lays them out, and their plain decoding. Included by every kernel. */
#ifndef TILES_H
#define TILES_H

#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are read as little-endian words"
#endif

enum { INT4, INT8, FP8 };
enum { TILE = 16, LINE = 64, BLOCK = 32 }; /* rows of a tile, bytes of a line, columns that are unpacked at once */

/* The same fields, in the same order, as library.py's. */
typedef struct {
    int32_t kind;
    int32_t half_scales; /* float16, not float32 */
    int64_t rows, columns, group;
    const uint8_t *codes;
    const uint8_t *scales;
} Matrix;

static inline int64_t num_tiles(const Matrix *m) { return (m->rows + TILE - 1) / TILE; }

static inline int columns_of_line(const Matrix *m) { return m->kind == INT4 ? 8 : 4; }

static inline const uint8_t *line_at(const Matrix *m, int64_t tile, int64_t column) {
    int width = columns_of_line(m);
    return m->codes + (tile * (m->columns / width) + column / width) * LINE;
}

/* Where the 16 scales of a tile's group begin; the 16 minima of int4 follow them. */
static inline const uint8_t *scales_at(const Matrix *m, int64_t tile, int64_t column) {
    int64_t bytes = (m->kind == INT4 ? 2 : 1) * TILE * (m->half_scales ? 2 : 4);
    return m->scales + (tile * (m->columns / m->group) + column / m->group) * bytes;
}

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Exact also where denormals are flushed, since no denormal float is made. */
static inline float float_of_half(uint16_t half) {
    uint32_t magnitude = half & 0x7fffu;
    float normal = float_of_bits((magnitude << 13) + (112u << 23));
    float small = (float)(int32_t)magnitude * 0x1p-24f;
    float value = magnitude < 0x400u ? small : normal;
    return half & 0x8000u ? -value : value;
}

static inline float float_of_e4m3(uint8_t byte) {
    uint32_t magnitude = byte & 0x7fu;
    float normal = float_of_bits((magnitude << 20) + (120u << 23));
    float small = (float)(int32_t)magnitude * 0x1p-9f;
    float value = magnitude < 8u ? small : normal;
    return byte & 0x80u ? -value : value;
}

static inline float float_of_bfloat(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }

/* To nearest, ties to even. Not for NaN. */
static inline uint16_t bfloat_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void load_scales(const Matrix *m, int64_t tile, int64_t column, float scale[TILE], float minimum[TILE]) {
    const uint8_t *from = scales_at(m, tile, column);
    for (int r = 0; r < TILE; r++) minimum[r] = 0;
    if (!m->half_scales) {
        memcpy(scale, from, TILE * 4);
        return;
    }
    uint16_t halves[2 * TILE];
    memcpy(halves, from, (m->kind == INT4 ? 2 : 1) * TILE * 2);
    for (int r = 0; r < TILE; r++) scale[r] = float_of_half(halves[r]);
    if (m->kind == INT4)
        for (int r = 0; r < TILE; r++) minimum[r] = float_of_half(halves[TILE + r]);
}

/* 32 columns of a tile as the numbers that scales multiply: out[column][row]. */
static inline void unpack_block(const Matrix *m, int64_t tile, int64_t column, float out[BLOCK][TILE]) {
    const uint8_t *lines = line_at(m, tile, column);
    uint32_t words[TILE];
    if (m->kind == INT4) {
        for (int b = 0; b < BLOCK / 8; b++) {
            memcpy(words, lines + b * LINE, LINE);
            for (int t = 0; t < 4; t++)
                for (int r = 0; r < TILE; r++) {
                    out[8 * b + 2 * t][r] = (float)(int32_t)(words[r] >> (4 * t) & 15u);
                    out[8 * b + 2 * t + 1][r] = (float)(int32_t)(words[r] >> (16 + 4 * t) & 15u);
                }
        }
        return;
    }
    for (int b = 0; b < BLOCK / 4; b++) {
        memcpy(words, lines + b * LINE, LINE);
        for (int t = 0; t < 2; t++)
            for (int j = 0; j < 2; j++) {
                float *to = out[4 * b + 2 * t + j];
                int shift = 16 * j + 8 * t;
                if (m->kind == INT8)
                    for (int r = 0; r < TILE; r++) to[r] = (float)((int32_t)(words[r] >> shift & 255u) - 128);
                else
                    for (int r = 0; r < TILE; r++) to[r] = float_of_e4m3((uint8_t)(words[r] >> shift & 255u));
            }
    }
}

/* 32 columns of a tile as the weights they stand for. q * scale of int4 is exact, so that contraction changes nothing. */
static inline void decode_block(const Matrix *m, int64_t tile, int64_t column, float out[BLOCK][TILE]) {
    float scale[TILE], minimum[TILE];
    load_scales(m, tile, column, scale, minimum);
    unpack_block(m, tile, column, out);
    for (int c = 0; c < BLOCK; c++)
        for (int r = 0; r < TILE; r++) out[c][r] = out[c][r] * scale[r] + minimum[r];
}

#endif
