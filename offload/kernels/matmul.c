/* Many rows of x times an encoded matrix with AMX: codes become tile operands once, x is laid out in tiles once.
 *
 * A line of codes unpacks straight into a row of a B tile (16 rows of the matrix, two columns each), so a panel of the
 * matrix is decoded without a transposition into a thread's own scratch, which stays in its caches.
 */
#include "tiles.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__) && defined(_OPENMP)
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

enum {
    OPERAND = 1024,        /* bytes of a tile register: 16 rows of 64 */
    FEW = 32,              /* rows of x whose sums stay in registers while the matrix passes by */
    CHUNK = 8,             /* blocks of 32 columns that are decoded at once for few rows: 32 KiB, half of L1 */
    PANEL_BYTES = 1 << 20, /* decoded at once for many rows: half of L2 */
    MOST_PAIRS = 8,        /* pairs of tiles in a panel */
    ARCH_REQUEST = 0x1023,
    TILE_DATA = 18
};

/* The compiler does not know which memory the tile instructions read: what was written before is there now. */
#define SETTLE(address) __asm__ volatile("" : : "r"(address) : "memory")

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Asks the kernel for the use of tile registers, for the whole process. */
int matmul_ready(void) { return syscall(SYS_arch_prctl, ARCH_REQUEST, TILE_DATA) == 0; }

static int64_t pairs_of_panel(const Matrix *m) {
    int64_t pairs = PANEL_BYTES / (2 * TILE * 2 * m->columns);
    return pairs < 1 ? 1 : pairs > MOST_PAIRS ? MOST_PAIRS : pairs;
}

static int64_t scratch_of_thread(const Matrix *m, int64_t num_x) {
    if (num_x <= FEW) return 4 * CHUNK * OPERAND;
    return pairs_of_panel(m) * 2 * (m->columns / BLOCK) * OPERAND;
}

/* Bytes of scratch that many_rows needs. */
int64_t matmul_scratch(const Matrix *m, int64_t num_x, int threads) {
    int64_t tiles_x = (num_x + TILE - 1) / TILE;
    return LINE + tiles_x * (m->columns / BLOCK) * OPERAND + threads * scratch_of_thread(m, num_x);
}

static void configure(void) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = LINE;
        config.rows[i] = TILE;
    }
    SETTLE(&config);
    _tile_loadconfig(&config);
}

/* 16 rows of x, or fewer and zeros, as A operands: [columns / 32][16][32]. */
static void lay_out(const Matrix *m, const uint16_t *x, int64_t rows, uint8_t *to) {
    for (int64_t block = 0; block < m->columns / BLOCK; block++)
        for (int64_t r = 0; r < TILE; r++) {
            const uint16_t *from = x + r * m->columns + block * BLOCK;
            _mm512_storeu_si512(to + block * OPERAND + r * LINE,
                                r < rows ? _mm512_loadu_si512(from) : _mm512_setzero_si512());
        }
}

INLINE void decode_operands(const Matrix *m, int64_t tile, int64_t block, int64_t blocks, uint8_t *to) {
    if (tile >= num_tiles(m)) return; /* what is there is multiplied too, but never stored */
    for (int64_t b = 0; b < blocks; b++) {
        __m512i pairs[16];
        decode_pairs(m, tile, (block + b) * BLOCK, pairs);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + b * OPERAND + i * LINE, pairs[i]);
        const uint8_t *ahead = line_at(m, tile, (block + b) * BLOCK) + 2048;
        for (int i = 0; i < BLOCK / columns_of_line(m); i++) _mm_prefetch(ahead + i * LINE, _MM_HINT_T0);
    }
}

#define ZERO_SUMS() \
    do { \
        _tile_zero(0); \
        _tile_zero(1); \
        _tile_zero(2); \
        _tile_zero(3); \
    } while (0)

INLINE void store_sums(const Matrix *m, float sums[TILE][TILE], int64_t tile, int64_t first_x, int64_t num_x,
                       const uint16_t *bias, uint16_t *out) {
    int64_t row = tile * TILE;
    SETTLE(sums);
    for (int64_t i = 0; i < TILE && first_x + i < num_x; i++)
        store_rows(out + (first_x + i) * m->rows + row, _mm512_load_ps(sums[i]), bias ? bias + row : 0, m->rows - row);
}

/* One accumulator, 16 rows of x by 16 of the matrix, to out. */
#define STORE(register_, tile, first_x) \
    do { \
        if ((tile) < num_tiles(m)) { \
            _tile_stored(register_, sums, LINE); \
            store_sums(m, sums, tile, first_x, num_x, bias, out); \
        } \
    } while (0)

/* Up to 16 rows of x by four tiles: four sums under way, since one instruction takes as long as four begin. */
static void panel_16(const Matrix *m, const uint8_t *a, int64_t num_x, int64_t tile, const uint16_t *bias,
                     uint16_t *out, uint8_t *b) {
    float sums[TILE][TILE] __attribute__((aligned(64)));
    int64_t blocks = m->columns / BLOCK;
    ZERO_SUMS();
    for (int64_t block = 0; block < blocks; block += CHUNK) {
        int64_t count = blocks - block < CHUNK ? blocks - block : CHUNK;
        for (int s = 0; s < 4; s++) decode_operands(m, tile + s, block, count, b + s * CHUNK * OPERAND);
        SETTLE(b);
        for (int64_t k = 0; k < count; k++) {
            _tile_loadd(4, a + (block + k) * OPERAND, LINE);
            _tile_loadd(5, b + k * OPERAND, LINE);
            _tile_loadd(6, b + (CHUNK + k) * OPERAND, LINE);
            _tile_loadd(7, b + (2 * CHUNK + k) * OPERAND, LINE);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, b + (3 * CHUNK + k) * OPERAND, LINE);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    STORE(0, tile, 0);
    STORE(1, tile + 1, 0);
    STORE(2, tile + 2, 0);
    STORE(3, tile + 3, 0);
}

/* 32 rows of x by two tiles. a0, a1, b0, b1: `count` operands each, added to what the registers hold. */
INLINE void multiply(const uint8_t *a0, const uint8_t *a1, const uint8_t *b0, const uint8_t *b1, int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        _tile_loadd(4, a0 + k * OPERAND, LINE);
        _tile_loadd(6, b0 + k * OPERAND, LINE);
        _tile_loadd(7, b1 + k * OPERAND, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a1 + k * OPERAND, LINE);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

#define STORE_SUMS(tile, first_x) \
    do { \
        STORE(0, tile, first_x); \
        STORE(1, (tile) + 1, first_x); \
        STORE(2, tile, (first_x) + TILE); \
        STORE(3, (tile) + 1, (first_x) + TILE); \
    } while (0)

static void panel_32(const Matrix *m, const uint8_t *a, int64_t num_x, int64_t tile, const uint16_t *bias,
                     uint16_t *out, uint8_t *b) {
    float sums[TILE][TILE] __attribute__((aligned(64)));
    int64_t blocks = m->columns / BLOCK;
    ZERO_SUMS();
    for (int64_t block = 0; block < blocks; block += CHUNK) {
        int64_t count = blocks - block < CHUNK ? blocks - block : CHUNK;
        for (int s = 0; s < 2; s++) decode_operands(m, tile + s, block, count, b + s * CHUNK * OPERAND);
        SETTLE(b);
        multiply(a + block * OPERAND, a + (blocks + block) * OPERAND, b, b + CHUNK * OPERAND, count);
    }
    STORE_SUMS(tile, 0);
}

/* A whole panel is decoded, then every 32 rows of x meet all of it. */
static void panel_many(const Matrix *m, const uint8_t *a, int64_t num_x, int64_t tile, int64_t pairs,
                       const uint16_t *bias, uint16_t *out, uint8_t *b) {
    float sums[TILE][TILE] __attribute__((aligned(64)));
    int64_t blocks = m->columns / BLOCK, tiles_x = (num_x + TILE - 1) / TILE;
    for (int64_t s = 0; s < 2 * pairs; s++) decode_operands(m, tile + s, 0, blocks, b + s * blocks * OPERAND);
    SETTLE(b);
    for (int64_t i = 0; i < tiles_x; i += 2) {
        const uint8_t *a0 = a + i * blocks * OPERAND;
        const uint8_t *a1 = i + 1 < tiles_x ? a0 + blocks * OPERAND : a0; /* a last odd one: twice, stored once */
        for (int64_t p = 0; p < pairs && tile + 2 * p < num_tiles(m); p++) {
            const uint8_t *b0 = b + 2 * p * blocks * OPERAND;
            ZERO_SUMS();
            multiply(a0, a1, b0, b0 + blocks * OPERAND, blocks);
            STORE_SUMS(tile + 2 * p, i * TILE);
        }
    }
}

/* out [num_x, rows] = x [num_x, columns] times the matrix, plus bias [rows] or NULL; all bfloat16. scratch: as
 * matmul_scratch says. Every sum is one thread's: the bits do not depend on `threads`. */
void many_rows(const Matrix *m, const uint16_t *x, int64_t num_x, const uint16_t *bias, uint16_t *out,
               uint8_t *scratch, int threads) {
    int64_t tiles_x = (num_x + TILE - 1) / TILE, blocks = m->columns / BLOCK;
    uint8_t *a = (uint8_t *)(((uintptr_t)scratch + LINE - 1) / LINE * LINE);
    uint8_t *own = a + tiles_x * blocks * OPERAND;
    int64_t own_bytes = scratch_of_thread(m, num_x), tiles = num_tiles(m), pairs = pairs_of_panel(m);
    int64_t step = num_x <= TILE ? 4 : num_x <= FEW ? 2 : 2 * pairs;
#pragma omp parallel num_threads(threads)
    {
        uint8_t *b = own + omp_get_thread_num() * own_bytes;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles_x; i++)
            lay_out(m, x + i * TILE * m->columns, num_x - i * TILE, a + i * blocks * OPERAND);
        configure();
#pragma omp for schedule(dynamic, 1)
        for (int64_t tile = 0; tile < tiles; tile += step) {
            if (num_x <= TILE)
                panel_16(m, a, num_x, tile, bias, out, b);
            else if (num_x <= FEW)
                panel_32(m, a, num_x, tile, bias, out, b);
            else
                panel_many(m, a, num_x, tile, pairs, bias, out, b);
        }
        _tile_release();
    }
}
#else
int matmul_ready(void) { return 0; }

int64_t matmul_scratch(const Matrix *m, int64_t num_x, int threads) {
    (void)m;
    (void)num_x;
    (void)threads;
    return 0;
}

void many_rows(const Matrix *m, const uint16_t *x, int64_t num_x, const uint16_t *bias, uint16_t *out,
               uint8_t *scratch, int threads) {
    (void)m, (void)x, (void)num_x, (void)bias, (void)out, (void)scratch, (void)threads;
}
#endif
