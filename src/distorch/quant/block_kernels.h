// The block formats of GGML: integers and their scales, into float32.
//
// Layouts and arithmetic follow ggml's block definitions (ggml-common.h) and its reference
// dequantize_row_* functions; the order of operations is kept, so results are bit-identical to
// gguf.quants.dequantize.
#include <stdint.h>
#include <string.h>

typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));

// Bytes go to float by way of int32, and never straight from memory: gcc 12 takes either apart, lane by
// lane (4 to 10 times slower).
#define TO_I32(v) __builtin_convertvector(v, i32x16)
#define TO_F32(v) __builtin_convertvector(v, f32x16)

static const i32x16 BIT = {1,   2,   4,    8,    16,   32,   64,    128,
                           256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

// Packed weights stream from memory and decoding leaves no room to wait for it: ask early.
#define AHEAD 4096  // bytes; measured best on AVX-512: decoding from memory 1.7 times as fast
static inline void prefetch(const uint8_t *block, int num_bytes) {
  for (int i = 0; i < num_bytes; i += 64) __builtin_prefetch(block + AHEAD + i);
}
static inline u8x16 load(const uint8_t *p) { u8x16 v; memcpy(&v, p, 16); return v; }
static inline void store(float *p, f32x16 v) { memcpy(p, &v, 64); }
static inline float half(const uint8_t *p) { _Float16 h; memcpy(&h, p, 2); return (float)h; }
static inline float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline f32x16 unsigned_f32(u8x16 v) { return TO_F32(TO_I32(v)); }
static inline f32x16 signed_f32(i8x16 v) { return TO_F32(TO_I32(v)); }

// 34 bytes -> 32 weights: scale f16, 32 x int8.
static void q8_0(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 34, o += 32) {
    prefetch(s, 34);
    const float d = half(s);
    const int8_t *q = (const int8_t *)(s + 2);
    for (int i = 0; i < 32; i++) o[i] = q[i] * d;  // gcc does this one best when left alone
  }
}

// 18 bytes -> 32 weights: scale f16, 32 x 4 bits centred on 8.
static void q4_0(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 18, o += 32) {
    prefetch(s, 18);
    const float d = half(s);
    const u8x16 q = load(s + 2);
    store(o, TO_F32(TO_I32(q & 15) - 8) * d);
    store(o + 16, TO_F32(TO_I32(q >> 4) - 8) * d);
  }
}

// 20 bytes -> 32 weights: scale f16, minimum f16, 32 x 4 bits.
static void q4_1(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 20, o += 32) {
    prefetch(s, 20);
    const float d = half(s), m = half(s + 2);
    const u8x16 q = load(s + 4);
    store(o, unsigned_f32(q & 15) * d + m);
    store(o + 16, unsigned_f32(q >> 4) * d + m);
  }
}

// The fifth bit of 32 weights, as 16 in the place where it belongs.
static inline void fifth_bits(const uint8_t *p, i32x16 *low, i32x16 *high) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  *low = (((int32_t)(bits & 0xffff) & BIT) != 0) & 16;  // a comparison is -1 where it is true
  *high = (((int32_t)(bits >> 16) & BIT) != 0) & 16;
}

// 22 bytes -> 32 weights: scale f16, 32 high bits, 32 x 4 low bits; centred on 16.
static void q5_0(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 22, o += 32) {
    prefetch(s, 22);
    const float d = half(s);
    const u8x16 q = load(s + 6);
    i32x16 low, high;
    fifth_bits(s + 2, &low, &high);
    store(o, TO_F32((TO_I32(q & 15) | low) - 16) * d);
    store(o + 16, TO_F32((TO_I32(q >> 4) | high) - 16) * d);
  }
}

// 24 bytes -> 32 weights: scale f16, minimum f16, 32 high bits, 32 x 4 low bits.
static void q5_1(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 24, o += 32) {
    prefetch(s, 24);
    const float d = half(s), m = half(s + 2);
    const u8x16 q = load(s + 8);
    i32x16 low, high;
    fifth_bits(s + 4, &low, &high);
    store(o, TO_F32(TO_I32(q & 15) | low) * d + m);
    store(o + 16, TO_F32(TO_I32(q >> 4) | high) * d + m);
  }
}

// 84 bytes -> 256 weights: 16 x (4-bit scale, 4-bit minimum), 2-bit weights, scale f16, minimum f16.
static void q2_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 84, o += 256) {
    prefetch(s, 84);
    const float d = half(s + 80), dmin = half(s + 82);
    float scale[16], minimum[16];
    for (int i = 0; i < 16; i++) scale[i] = d * (s[i] & 15), minimum[i] = dmin * (s[i] >> 4);
    for (int part = 0; part < 4; part++) {  // two halves of 128 weights, two columns of 16 each
      const int group = 8 * (part >> 1) + (part & 1);
      const u8x16 q = load(s + 16 + 16 * part);
      const float *a = scale + group, *b = minimum + group;
      float *r = o + 16 * group;
      store(r, unsigned_f32(q & 3) * a[0] - b[0]);
      store(r + 32, unsigned_f32(q >> 2 & 3) * a[2] - b[2]);
      store(r + 64, unsigned_f32(q >> 4 & 3) * a[4] - b[4]);
      store(r + 96, unsigned_f32(q >> 6) * a[6] - b[6]);
    }
  }
}

// 110 bytes -> 256 weights: 256 high bits, 2 low bits each, 16 x 6-bit scale, scale f16.
static void q3_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 110, o += 256) {
    prefetch(s, 110);
    const float d = half(s + 108);
    float scale[16];
    for (int i = 0; i < 16; i++) {
      const int low = s[96 + i % 8] >> (i / 8 * 4) & 15, high = s[104 + i % 4] >> (i / 4 * 2) & 3;
      scale[i] = d * ((low | high << 4) - 32);
    }
    for (int part = 0; part < 4; part++) {
      const int side = part >> 1, group = 8 * side + (part & 1);
      const u8x16 q = load(s + 32 + 16 * part), bits = load(s + 16 * (part & 1));
      const u8x16 high = side ? bits >> 4 : bits & 15;
      const float *a = scale + group;
      float *r = o + 16 * group;
      store(r, TO_F32(TO_I32((q & 3) | (high << 2 & 4)) - 4) * a[0]);
      store(r + 32, TO_F32(TO_I32((q >> 2 & 3) | (high << 1 & 4)) - 4) * a[2]);
      store(r + 64, TO_F32(TO_I32((q >> 4 & 3) | (high & 4)) - 4) * a[4]);
      store(r + 96, TO_F32(TO_I32((q >> 6) | (high >> 1 & 4)) - 4) * a[6]);
    }
  }
}

// Group i of the 8 x (6-bit scale, 6-bit minimum) that 12 bytes hold.
static inline void scale_and_minimum(const uint8_t *p, int i, uint8_t *scale, uint8_t *minimum) {
  *scale = i < 4 ? p[i] & 63 : (p[i + 4] & 15) | (p[i - 4] >> 6 << 4);
  *minimum = i < 4 ? p[i + 4] & 63 : (p[i + 4] >> 4) | (p[i] >> 6 << 4);
}

// 144 bytes -> 256 weights: scale f16, minimum f16, 8 x (6-bit scale, 6-bit minimum), 4-bit weights.
static void q4_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 144, o += 256) {
    prefetch(s, 144);
    const float d = half(s), dmin = half(s + 2);
    for (int i = 0; i < 8; i++) {
      uint8_t scale, minimum;
      scale_and_minimum(s + 4, i, &scale, &minimum);
      const float a = d * scale, b = dmin * minimum;
      for (int part = 0; part < 2; part++) {
        const u8x16 q = load(s + 16 + 32 * (i / 2) + 16 * part);
        store(o + 32 * i + 16 * part, unsigned_f32(i % 2 ? q >> 4 : q & 15) * a - b);
      }
    }
  }
}

// 176 bytes -> 256 weights: as above, with 256 high bits before the 4-bit weights.
static void q5_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 176, o += 256) {
    prefetch(s, 176);
    const float d = half(s), dmin = half(s + 2);
    u8x16 high[2] = {load(s + 16), load(s + 32)};
    for (int i = 0; i < 8; i++) {
      uint8_t scale, minimum;
      scale_and_minimum(s + 4, i, &scale, &minimum);
      const float a = d * scale, b = dmin * minimum;
      for (int part = 0; part < 2; part++) {
        const u8x16 q = load(s + 48 + 32 * (i / 2) + 16 * part);
        const u8x16 weights = (i % 2 ? q >> 4 : q & 15) | (high[part] & 1) << 4;
        store(o + 32 * i + 16 * part, unsigned_f32(weights) * a - b);
        high[part] >>= 1;
      }
    }
  }
}

// 210 bytes -> 256 weights: 4 low bits, 2 high bits, 16 x int8 scale, scale f16.
static void q6_k(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 210, o += 256) {
    prefetch(s, 210);
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

// What nibbles stand for, where it is not themselves: IQ4's values, and E2M1's, twice.
static const i8x16 IQ4 = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const i8x16 E2M1 = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static inline f32x16 look_up(i8x16 values, u8x16 index) {
#ifdef __clang__  // which shuffles by constants only
  i8x16 found;
  for (int i = 0; i < 16; i++) found[i] = values[index[i]];
  return signed_f32(found);
#else
  return signed_f32(__builtin_shuffle(values, (i8x16)index));
#endif
}

// 18 bytes -> 32 weights: scale f16, 32 nibbles.
static void iq4_nl(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 18, o += 32) {
    prefetch(s, 18);
    const float d = half(s);
    const u8x16 q = load(s + 2);
    store(o, look_up(IQ4, q & 15) * d);
    store(o + 16, look_up(IQ4, q >> 4) * d);
  }
}

// 136 bytes -> 256 weights: scale f16, 8 x 2 high and 8 x 4 low bits of scales, nibbles.
static void iq4_xs(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 136, o += 256) {
    prefetch(s, 136);
    const float d = half(s);
    for (int i = 0; i < 8; i++) {
      const int low = (s[4 + i / 2] >> (i % 2 * 4)) & 15, high = (s[2 + i / 4] >> (i % 4 * 2)) & 3;
      const float a = d * ((low | high << 4) - 32);
      const u8x16 q = load(s + 8 + 16 * i);
      store(o + 32 * i, look_up(IQ4, q & 15) * a);
      store(o + 32 * i + 16, look_up(IQ4, q >> 4) * a);
    }
  }
}

// 17 bytes -> 32 weights: scale, half of a power of two; 32 nibbles.
static void mxfp4(const uint8_t *s, float *o, int64_t n) {
  for (; n--; s += 17, o += 32) {
    prefetch(s, 17);
    const float d = from_bits(s[0] < 2 ? 0x00200000u << s[0] : (s[0] - 1u) << 23);
    const u8x16 q = load(s + 1);
    store(o, look_up(E2M1, q & 15) * d);
    store(o + 16, look_up(E2M1, q >> 4) * d);
  }
}
