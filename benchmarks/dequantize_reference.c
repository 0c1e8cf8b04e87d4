// What the kernels are measured against: the plainest C that decodes a format, one loop after the
// other, and whatever the compiler makes of it at -O3 -march=native. One thread: the caller has more.
#include <stdint.h>
#include <string.h>

static float half(const uint8_t *p) {
  _Float16 value;
  memcpy(&value, p, 2);
  return (float)value;
}

void reference_q8_0(const uint8_t *restrict b, float *restrict o, int64_t n) {
  for (; n--; b += 34, o += 32) {
    const float d = half(b);
    for (int i = 0; i < 32; i++) o[i] = (int8_t)b[2 + i] * d;
  }
}

void reference_q4_0(const uint8_t *restrict b, float *restrict o, int64_t n) {
  for (; n--; b += 18, o += 32) {
    const float d = half(b);
    for (int i = 0; i < 16; i++) o[i] = ((b[2 + i] & 15) - 8) * d;
    for (int i = 0; i < 16; i++) o[i + 16] = ((b[2 + i] >> 4) - 8) * d;
  }
}

static void scale_and_minimum(const uint8_t *p, int i, float *scale, float *minimum) {
  *scale = i < 4 ? p[i] & 63 : (p[i + 4] & 15) | (p[i - 4] >> 6 << 4);
  *minimum = i < 4 ? p[i + 4] & 63 : (p[i + 4] >> 4) | (p[i] >> 6 << 4);
}

void reference_q4_k(const uint8_t *restrict b, float *restrict o, int64_t n) {
  for (; n--; b += 144, o += 256)
    for (int group = 0; group < 8; group++) {
      const uint8_t *q = b + 16 + group / 2 * 32;
      const int shift = group % 2 * 4;
      float scale, minimum;
      scale_and_minimum(b + 4, group, &scale, &minimum);
      scale *= half(b), minimum *= half(b + 2);
      for (int i = 0; i < 32; i++) o[group * 32 + i] = (q[i] >> shift & 15) * scale - minimum;
    }
}

void reference_q5_k(const uint8_t *restrict b, float *restrict o, int64_t n) {
  for (; n--; b += 176, o += 256)
    for (int group = 0; group < 8; group++) {
      const uint8_t *q = b + 48 + group / 2 * 32, *high = b + 16;
      const int shift = group % 2 * 4;
      float scale, minimum;
      scale_and_minimum(b + 4, group, &scale, &minimum);
      scale *= half(b), minimum *= half(b + 2);
      for (int i = 0; i < 32; i++) {
        const int weight = (q[i] >> shift & 15) | (high[i] >> group & 1) << 4;
        o[group * 32 + i] = weight * scale - minimum;
      }
    }
}

void reference_q6_k(const uint8_t *restrict b, float *restrict o, int64_t n) {
  for (; n--; b += 210, o += 256)
    for (int group = 0; group < 16; group++) {
      const uint8_t *low = b + group / 8 * 64 + group % 4 * 16, *high = b + 128 + group / 8 * 32;
      const int low_shift = group % 8 / 4 * 4, high_shift = group % 8 / 2 * 2;
      const float scale = half(b + 208) * (int8_t)b[192 + group];
      for (int i = 0; i < 16; i++) {
        const int top = high[group % 2 * 16 + i] >> high_shift & 3;
        o[group * 16 + i] = scale * (((low[i] >> low_shift & 15) | top << 4) - 32);
      }
    }
}

// Eight bits of floating point are 256 numbers: a table of them, which the caller fills.
float reference_table[256];

static void by_table(const uint8_t *restrict b, float *restrict o, int64_t n) {
  for (int64_t i = 0; i < n; i++) o[i] = reference_table[b[i]];
}

void reference_f8_e4m3(const uint8_t *b, float *o, int64_t n) { by_table(b, o, n); }
void reference_f8_e5m2(const uint8_t *b, float *o, int64_t n) { by_table(b, o, n); }
