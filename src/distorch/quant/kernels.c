// Dequantisation of GGML block formats into float32, on the CPU.
//
// Layouts and arithmetic follow ggml's block definitions (ggml-common.h) and its reference
// dequantize_row_* functions; the order of operations is kept, so results are bit-identical to
// gguf.quants.dequantize. Written with the vector extensions that gcc and clang share, so one
// source serves every instruction set. Built on first use by native.py; -ffp-contract=off keeps
// a*b-c two roundings, as the reference has.
#include <stdint.h>
#include <string.h>

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));

// bytes go to float by way of int32: gcc 12 takes a direct conversion apart lane by lane (4x slower)
#define TO_I32(v) __builtin_convertvector(v, i32x16)
#define TO_F32(v) __builtin_convertvector(v, f32x16)

static const i32x16 BIT = {1,   2,   4,    8,    16,   32,   64,    128,
                           256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

// Packed weights stream from memory and decoding leaves no room to wait for it: ask early.
#define AHEAD 4096  // bytes; measured best on AVX-512: decoding from memory 1.7 times as fast
static inline void prefetch(const uint8_t *p) { __builtin_prefetch(p + AHEAD); }
static inline u8x16 load(const uint8_t *p) { u8x16 v; memcpy(&v, p, 16); return v; }
static inline void store(float *p, f32x16 v) { memcpy(p, &v, 64); }
static inline float half(const uint8_t *p) { _Float16 h; memcpy(&h, p, 2); return (float)h; }

// 34 bytes -> 32 weights: scale f16, 32 x int8.
static void q8_0(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 34, o += 32) {
    prefetch(s);
    const float d = half(s);
    const int8_t *q = (const int8_t *)(s + 2);
    for (int i = 0; i < 32; i++) o[i] = q[i] * d;  // gcc does this one best when left alone
  }
}

// 22 bytes -> 32 weights: scale f16, 32 high bits, 32 x 4 low bits.
static void q5_0(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 22, o += 32) {
    prefetch(s);
    const float d = half(s);
    uint32_t high;
    memcpy(&high, s + 2, 4);
    const u8x16 q = load(s + 6);
    // a comparison is -1 where the high bit is missing: those weights lose 16
    const i32x16 no_low = ((int32_t)(high & 0xffff) & BIT) == 0;
    const i32x16 no_high = ((int32_t)(high >> 16) & BIT) == 0;
    store(o, TO_F32(TO_I32(q & 15) - (no_low & 16)) * d);
    store(o + 16, TO_F32(TO_I32(q >> 4) - (no_high & 16)) * d);
  }
}

// 144 bytes -> 256 weights: scale f16, minimum f16, 8 x (6-bit scale, 6-bit minimum), 4-bit weights.
static void q4_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 144, o += 256) {
    prefetch(s), prefetch(s + 64), prefetch(s + 128);
    const float d = half(s), dmin = half(s + 2);
    const uint8_t *packed = s + 4;
    for (int i = 0; i < 8; i++) {
      const uint8_t scale = i < 4 ? packed[i] & 63 : (packed[i + 4] & 15) | (packed[i - 4] >> 6 << 4);
      const uint8_t min = i < 4 ? packed[i + 4] & 63 : (packed[i + 4] >> 4) | (packed[i] >> 6 << 4);
      const float a = d * scale, b = dmin * min;
      const uint8_t *q = s + 16 + 32 * (i / 2);
      for (int half_row = 0; half_row < 2; half_row++) {
        const u8x16 v = load(q + 16 * half_row);
        store(o + 32 * i + 16 * half_row, TO_F32(TO_I32(i & 1 ? v >> 4 : v & 15)) * a - b);
      }
    }
  }
}

// 210 bytes -> 256 weights: 4 low bits, 2 high bits, 16 x int8 scale, scale f16.
static void q6_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 210, o += 256) {
    prefetch(s), prefetch(s + 64), prefetch(s + 128), prefetch(s + 192);
    const float d = half(s + 208);
    const int8_t *scales = (const int8_t *)(s + 192);
    for (int part = 0; part < 4; part++) {  // two halves of 128 weights, two columns of 16 each
      const int side = part >> 1, column = part & 1;
      const u8x16 low0 = load(s + 64 * side + 16 * column);
      const u8x16 low1 = load(s + 64 * side + 32 + 16 * column);
      const u8x16 high = load(s + 128 + 32 * side + 16 * column);
      const int8_t *c = scales + 8 * side + column;
      float *r = o + 128 * side + 16 * column;
      store(r, TO_F32(TO_I32((low0 & 15) | ((high & 3) << 4)) - 32) * (d * c[0]));
      store(r + 32, TO_F32(TO_I32((low1 & 15) | ((high & 12) << 2)) - 32) * (d * c[2]));
      store(r + 64, TO_F32(TO_I32((low0 >> 4) | (high & 48)) - 32) * (d * c[4]));
      store(r + 96, TO_F32(TO_I32((low1 >> 4) | ((high & 192) >> 2)) - 32) * (d * c[6]));
    }
  }
}

// Work is cut into tiles of TILE weights (64 KiB of float32: fits a core's cache) that OpenMP's
// threads share: the same pool torch computes with, so the two never fight over cores.
#define TILE 16384
#define EXPORT(name, block_elements, block_bytes)                                      \
  void distorch_##name(const uint8_t *source, float *out, int64_t num_blocks) {        \
    const int64_t step = TILE / block_elements, tiles = (num_blocks + step - 1) / step; \
    _Pragma("omp parallel for schedule(static) if (tiles > 1)")                        \
    for (int64_t t = 0; t < tiles; t++) {                                              \
      const int64_t first = t * step;                                                  \
      const int64_t count = num_blocks - first < step ? num_blocks - first : step;     \
      name(source + first * block_bytes, out + first * block_elements, count);         \
    }                                                                                  \
  }

EXPORT(q8_0, 32, 34)
EXPORT(q5_0, 32, 22)
EXPORT(q4_k, 256, 144)
EXPORT(q6_k, 256, 210)
