// Dequantisation on the CPU, into float32, bfloat16 or float16.
//
// Written with the vector extensions that gcc and clang share, so one source serves every instruction
// set. Built on first use by native.py; -ffp-contract=off keeps a*b-c two roundings, as the reference
// has.
#include "block_kernels.h"

static inline i32x16 choose(i32x16 mask, i32x16 yes, i32x16 no) { return (mask & yes) | (~mask & no); }

// Floating point of fewer bits, made wider: the magnitude has so many bits of mantissa and an exponent
// with a bias; from `special` on there are infinity and NaN, whose exponent is to become 255.
static inline f32x16 widen(i32x16 magnitude, i32x16 sign, int mantissa, int bias, int special) {
  const i32x16 denormal = (i32x16)(TO_F32(magnitude) * from_bits((128 - bias - mantissa) << 23));
  const i32x16 normal = (magnitude << (23 - mantissa)) + ((127 - bias) << 23);
  const i32x16 more = (magnitude >= special) & ((128 + bias - (special >> mantissa)) << 23);
  return (f32x16)(choose(magnitude < 1 << mantissa, denormal, normal + more) | sign);
}
static inline f32x16 from_f16(u16x16 v) {
  return widen(TO_I32(v & 0x7fff), TO_I32(v & 0x8000) << 16, 10, 15, 31 << 10);
}
static inline f32x16 from_bf16(u16x16 v) { return (f32x16)(TO_I32(v & 0xffff) << 16); }
static inline f32x16 from_e4m3(u8x16 v) {
  return widen(TO_I32(v & 127), TO_I32(v & 128) << 24, 3, 7, 127);
}
static inline f32x16 from_e5m2(u8x16 v) {
  return widen(TO_I32(v & 127), TO_I32(v & 128) << 24, 2, 15, 31 << 2);
}

// Weights that are no blocks: 16 at a time, and what is left.
#define DENSE(name, stored, in_f32)                                  \
  static void name(const uint8_t *s, float *o, int64_t n) {          \
    for (; n >= 16; n -= 16, s += sizeof(stored), o += 16) {         \
      stored v;                                                      \
      prefetch(s, sizeof v);                                         \
      memcpy(&v, s, sizeof v);                                       \
      store(o, in_f32(v));                                           \
    }                                                                \
    stored rest = {0};                                               \
    memcpy(&rest, s, n * sizeof rest / 16);                          \
    const f32x16 last = in_f32(rest);                                \
    memcpy(o, &last, 4 * n);                                         \
  }

DENSE(f32, f32x16, )
DENSE(f16, u16x16, from_f16)
DENSE(bf16, u16x16, from_bf16)
DENSE(f8_e4m3, u8x16, from_e4m3)
DENSE(f8_e5m2, u8x16, from_e5m2)

static void i8(const uint8_t *s, float *o, int64_t n) {
  for (int64_t i = 0; i < n; i++) o[i] = (int8_t)s[i];
}

enum { F32, BF16, F16 };  // what is written; native.py has the same numbers

// Narrower, to the nearest, ties to even. A NaN becomes the usual one of the format.
static inline i32x16 to_bf16(f32x16 value) {
  const i32x16 bits = (i32x16)value;
  const i32x16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return choose((bits & 0x7fffffff) > 0x7f800000, (bits & 0) + 0x7fc0, rounded);
}

static inline i32x16 to_f16(f32x16 value) {
  const i32x16 bits = (i32x16)value, magnitude = bits & 0x7fffffff;
  // beside a half, the last bit of a float32 is the last one of a float16 below 2^-14
  const i32x16 denormal = (i32x16)((f32x16)magnitude + 0.5f) - 0x3f000000;
  const i32x16 normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const i32x16 finite = choose(magnitude < (127 - 14) << 23, denormal, normal);
  const i32x16 special = 0x7c00 + ((magnitude > 0x7f800000) & 0x200);
  return choose(magnitude >= (127 + 16) << 23, special, finite) | (bits >> 16 & 0x8000);
}

static void narrow(const float *values, uint16_t *o, int64_t n, int kind) {
  for (int64_t i = 0; i < n; i += 16) {  // `values` has room for whole vectors
    f32x16 v;
    memcpy(&v, values + i, sizeof v);
    const u16x16 rounded = __builtin_convertvector(kind == BF16 ? to_bf16(v) : to_f16(v), u16x16);
    memcpy(o + i, &rounded, n - i < 16 ? 2 * (n - i) : 32);
  }
}

typedef void decode_fn(const uint8_t *, float *, int64_t);

// Work is cut into tiles that OpenMP's threads share: the same pool torch computes with, so the two
// never fight over cores. What is narrower than float32 is rounded while it is in the nearest cache.
#define TILE 16384  // weights: 64 KiB of float32
#define PIECE 2048

static void decode_tile(decode_fn *decode, int elements, int bytes, const uint8_t *source, void *out,
                        int64_t num_blocks, int kind) {
  if (kind == F32) { decode(source, out, num_blocks); return; }
  float piece[PIECE] __attribute__((aligned(64)));
  uint16_t *rounded = out;
  while (num_blocks > 0) {
    const int64_t count = num_blocks < PIECE / elements ? num_blocks : PIECE / elements;
    const int64_t weights = count * elements;
    decode(source, piece, count);
    narrow(piece, rounded, weights, kind);
    source += count * bytes, rounded += weights, num_blocks -= count;
  }
}

#define EXPORT(name, elements, bytes)                                                            \
  void distorch_##name(const uint8_t *source, void *out, int64_t num_blocks, int kind) {         \
    const int64_t step = TILE / elements, tiles = (num_blocks + step - 1) / step;                \
    const int64_t written = (kind == F32 ? 4 : 2) * elements;                                    \
    _Pragma("omp parallel for schedule(static) if (tiles > 1)")                                  \
    for (int64_t t = 0; t < tiles; t++) {                                                        \
      const int64_t first = t * step, left = num_blocks - first;                                 \
      decode_tile(name, elements, bytes, source + first * bytes, (char *)out + first * written,  \
                  left < step ? left : step, kind);                                              \
    }                                                                                            \
  }

EXPORT(f32, 1, 4)
EXPORT(f16, 1, 2)
EXPORT(bf16, 1, 2)
EXPORT(f8_e4m3, 1, 1)
EXPORT(f8_e5m2, 1, 1)
EXPORT(i8, 1, 1)
EXPORT(q8_0, 32, 34)
EXPORT(q4_0, 32, 18)
EXPORT(q4_1, 32, 20)
EXPORT(q5_0, 32, 22)
EXPORT(q5_1, 32, 24)
EXPORT(q2_k, 256, 84)
EXPORT(q3_k, 256, 110)
EXPORT(q4_k, 256, 144)
EXPORT(q5_k, 256, 176)
EXPORT(q6_k, 256, 210)
EXPORT(iq4_nl, 32, 18)
EXPORT(iq4_xs, 256, 136)
EXPORT(mxfp4, 32, 17)
