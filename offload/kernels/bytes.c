/* Floats to int8 and fp8, scale = max|w| / largest code. quantize.py is the reference; the bytes are the same. */
#include "tiles.h"

static inline uint16_t half_of_float(float value) { /* value >= 0, below 65520; to nearest, ties to even */
    if (value < 0x1p-14f) return (uint16_t)((value + 0.5f - 0.5f) * 0x1p24f);
    uint32_t bits = bits_of_float(value);
    return (uint16_t)((bits + 0xfffu + (bits >> 13 & 1u) - (112u << 23)) >> 13);
}

/* |value| <= 448, to nearest, ties to even. */
static inline uint32_t e4m3_of_float(float value) {
    uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
    float size = float_of_bits(magnitude);
    uint32_t small = (uint32_t)(int32_t)((size + 16384.0f - 16384.0f) * 512.0f);
    uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20;
    return (size < 0x1p-6f ? small : normal) | (bits >> 24 & 0x80u);
}

static float scale_of(const float *w, int64_t group, float most, int half_scales, uint16_t *half) {
    uint32_t largest = 0; /* of the bits without sign, which are ordered as the sizes are */
    for (int64_t c = 0; c < group; c++) {
        uint32_t magnitude = bits_of_float(w[c]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = float_of_bits(largest) / most;
    if (scale < 0x1p-100f) scale = 0;
    if (!half_scales) return scale;
    *half = half_of_float(scale);
    return float_of_half(*half);
}

/* Four neighbours of a row, one code a byte, as the word of a line: (row, parity, step) from (row, step, parity). */
static inline uint32_t word_of(uint32_t row) {
    return (row & 0xff0000ffu) | (row >> 8 & 0xff00u) | (row & 0xff00u) << 8;
}

static inline void encode_group(const float *w, int64_t group, int kind, float scale, uint32_t *words) {
    float divisor = scale == 0 ? 1 : scale;
    uint32_t codes[BLOCK];
    for (int64_t block = 0; block < group; block += BLOCK) {
        for (int c = 0; c < BLOCK; c++) {
            float value = scale == 0 ? 0 : w[block + c] / divisor;
            if (kind == INT8) {
                value = value > 127 ? 127 : value < -127 ? -127 : value;
                codes[c] = (uint32_t)((int32_t)(value + 12582912.0f - 12582912.0f) + 128);
            } else {
                value = value > 448 ? 448 : value < -448 ? -448 : value;
                codes[c] = e4m3_of_float(value);
            }
        }
        for (int b = 0; b < BLOCK / 4; b++) {
            const uint32_t *four = codes + 4 * b;
            words[(block / 4 + b) * TILE] = word_of(four[0] | four[1] << 8 | four[2] << 16 | four[3] << 24);
        }
    }
}

/* w float32 [rows, columns], finite, to the codes and scales of its tiles. most: 127 or 448. */
void encode_bytes(const float *w, int64_t rows, int64_t columns, int64_t group, int kind, float most, int half_scales,
                  uint8_t *codes, uint8_t *scales, int threads) {
    int64_t tiles = (rows + TILE - 1) / TILE, groups = columns / group;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t r = 0; r < TILE; r++) {
            int64_t row = tile * TILE + r;
            uint32_t *words = (uint32_t *)(codes + tile * (columns / 4) * LINE) + r;
            for (int64_t g = 0; g < groups; g++) {
                uint16_t half = 0;
                float scale = 0;
                if (row < rows) {
                    const float *from = w + row * columns + g * group;
                    scale = scale_of(from, group, most, half_scales, &half);
                    encode_group(from, group, kind, scale, words + g * (group / 4) * TILE);
                } else {
                    for (int64_t b = 0; b < group / 4; b++) words[(g * (group / 4) + b) * TILE] = 0;
                }
                int64_t at = (tile * groups + g) * TILE + r;
                if (half_scales)
                    memcpy(scales + at * 2, &half, 2);
                else
                    memcpy(scales + at * 4, &scale, 4);
            }
        }
}
