// What decode steps do most, for CPUs with AVX512-BF16: vectors of 16 float32 or 32 bf16 numbers, and
// the product that all else is made of.
//
// Few rows make a product as slow as its weights are read. So each weight is read once, straight
// from the checkpoint's layout: nothing is packed or copied. Four rows of a weight are multiplied
// side by side, but fetched one after the other, as they stand: with several streams at once a core
// reads memory half as fast. Sums are float32. Sizes along which is summed are multiples of 32.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { WIDE = 32, ROWS = 4, MAX_TOKENS = 4, ROWS_A_TASK = 64, PIECE = 64 };
enum { FEW_WEIGHTS = 1 << 18, ROWS_A_READ = 8 };
enum { LINE = 64, AHEAD = 8192 };  // bytes: what is fetched at once, and how far ahead at the least

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How many threads share a product of m rows and so many weights. Waking the others takes as long
// as FEW_WEIGHTS do; a row takes ROWS_A_READ-th of what reading its weights does.
INLINE int crew(int64_t m, int64_t num_weights, int threads) {
  return num_weights * larger(1, m / ROWS_A_READ) < FEW_WEIGHTS ? 1 : threads;
}

INLINE __m512bh load32(const bf16 *at) { return (__m512bh)_mm512_loadu_si512(at); }

INLINE __m512 widen(const bf16 *at) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

INLINE void narrow(bf16 *at, __m512 values) {
  _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(values));
}

INLINE float number(bf16 value) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int32_t)((uint32_t)value << 16))));
}

INLINE bf16 bf16_of(float value) {
  return _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0);
}

// A value as a bf16 buffer would give it back.
INLINE __m512 rounded(__m512 values) {
  __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

INLINE __m256 folded(__m512 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

INLINE __m128 sums_of_4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m256 ab = _mm256_hadd_ps(folded(a), folded(b));
  __m256 cd = _mm256_hadd_ps(folded(c), folded(d));
  __m256 all = _mm256_hadd_ps(ab, cd);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// e to the x: two to the whole part of x / ln 2, times the Taylor series of what is left.
INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-104.0f));
  __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  const float inverses[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(inverses[i]));
  return _mm512_scalef_ps(sum, whole);
}

INLINE __m512 silu(__m512 x) {
  __m512 opposite = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), opposite));
}

// sums[t][r] = x[t] · w[r] for ROWS rows that stand w_stride apart and `num` rows of x. As much
// memory as is read is fetched from `ahead` on, unless that is NULL.
INLINE void multiply_fixed(const bf16 *w, int64_t w_stride, const bf16 *x, int64_t x_stride,
                           int64_t size, const int num, const char *ahead, __m128 *sums) {
  __m512 acc[MAX_TOKENS][ROWS];
  for (int t = 0; t < num; t++)
    for (int r = 0; r < ROWS; r++) acc[t][r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += WIDE) {
    __m512bh rows[ROWS];
    for (int r = 0; r < ROWS; r++) rows[r] = load32(w + r * w_stride + i);
    if (ahead)
      for (int r = 0; r < ROWS; r++, ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T0);
    for (int t = 0; t < num; t++) {
      __m512bh token = load32(x + t * x_stride + i);
      for (int r = 0; r < ROWS; r++) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], rows[r], token);
    }
  }
  for (int t = 0; t < num; t++) sums[t] = sums_of_4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
}

INLINE void multiply(const bf16 *w, int64_t w_stride, const bf16 *x, int64_t x_stride,
                     int64_t size, int64_t num, const char *ahead, __m128 *sums) {
  switch (num) {
    case 1: multiply_fixed(w, w_stride, x, x_stride, size, 1, ahead, sums); break;
    case 2: multiply_fixed(w, w_stride, x, x_stride, size, 2, ahead, sums); break;
    case 3: multiply_fixed(w, w_stride, x, x_stride, size, 3, ahead, sums); break;
    default: multiply_fixed(w, w_stride, x, x_stride, size, 4, ahead, sums);
  }
}

// Columns first to last of out[m, out_size] = x[m, size] · w[out_size, size]ᵀ. At the end, where
// fewer than ROWS may be left, the last ROWS are done, some of them a second time.
INLINE void product(const bf16 *x, const bf16 *w, bf16 *out, int64_t m, int64_t size,
                    int64_t out_size, int64_t first, int64_t last) {
  __m128 sums[MAX_TOKENS];
  int64_t bytes = ROWS * size * sizeof(bf16), distance = bytes < AHEAD ? AHEAD : bytes;
  for (int64_t next = first; next < last; next += ROWS) {
    int64_t row = smaller(next, out_size - ROWS);
    for (int64_t t = 0; t < m; t += MAX_TOKENS) {
      int64_t num = smaller(m - t, MAX_TOKENS);
      const char *ahead = t ? NULL : (const char *)(w + row * size) + distance;
      multiply(w + row * size, size, x + t * size, size, size, num, ahead, sums);
      for (int64_t c = 0; c < num; c++)
        _mm_storel_epi64((__m128i *)(out + (t + c) * out_size + row),
                         (__m128i)_mm_cvtneps_pbh(sums[c]));
    }
  }
}

// Columns first to last of inner[m, width] = silu(gate) · up, where gate_up[m, 2 width] is given.
INLINE void activate(const bf16 *gate_up, bf16 *inner, int64_t m, int64_t width, int64_t first,
                     int64_t last) {
  for (int64_t t = 0; t < m; t++)
    for (int64_t i = first; i < last; i += 16) {
      __m512 gate = rounded(silu(widen(gate_up + t * 2 * width + i)));
      __m512 up = widen(gate_up + t * 2 * width + width + i);
      narrow(inner + t * width + i, _mm512_mul_ps(gate, up));
    }
}
