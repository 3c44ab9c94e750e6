// Each token by itself: linear map, norm, rotation.

#include "vectors.h"

enum { FEW = 16 };  // rows: to wake other threads for them takes longer than they do

// out[m, out_size] = x[m, size] · w[out_size, size]ᵀ; out_size is 4 at the least.
void linear(const bf16 *x, const bf16 *w, bf16 *out, int64_t m, int64_t size, int64_t out_size,
            int threads) {
  int64_t num_tasks = (out_size + ROWS_A_TASK - 1) / ROWS_A_TASK;
#pragma omp parallel for schedule(dynamic, 2) num_threads(crew(m, size *out_size, threads))
  for (int64_t task = 0; task < num_tasks; task++) {
    int64_t first = task * ROWS_A_TASK;
    product(x, w, out, m, size, out_size, first, smaller(first + ROWS_A_TASK, out_size));
  }
}

// out[m, size] = x over the root of its mean square, in bf16, times weight. size: a multiple of 16.
void norm(const bf16 *x, const bf16 *weight, bf16 *out, int64_t m, int64_t size, float eps,
          int threads) {
#pragma omp parallel for num_threads(threads) if (m > FEW)
  for (int64_t t = 0; t < m; t++) {
    const bf16 *row = x + t * size;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
      __m512 value = widen(row + i);
      sum = _mm512_fmadd_ps(value, value, sum);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / size + eps));
    for (int64_t i = 0; i < size; i += 16) {
      __m512 normed = rounded(_mm512_mul_ps(widen(row + i), scale));
      narrow(out + t * size + i, _mm512_mul_ps(normed, widen(weight + i)));
    }
  }
}

// Rotate num_heads heads of each token in place; tokens stand `stride` apart. The partner of a
// dimension is half a head further; cosines, sines: [m, head_dim / 2], head_dim a multiple of 32.
void rotate(bf16 *heads, int64_t stride, const bf16 *cosines, const bf16 *sines, int64_t m,
            int64_t num_heads, int64_t head_dim, int threads) {
  int64_t half = head_dim / 2;
#pragma omp parallel for num_threads(threads) if (m > FEW)
  for (int64_t t = 0; t < m; t++)
    for (int64_t i = 0; i < half; i += 16) {
      __m512 cosine = widen(cosines + t * half + i), sine = widen(sines + t * half + i);
      for (int64_t h = 0; h < num_heads; h++) {
        bf16 *at = heads + t * stride + h * head_dim + i;
        __m512 first = widen(at), second = widen(at + half);
        narrow(at, _mm512_fnmadd_ps(second, sine, _mm512_mul_ps(first, cosine)));
        narrow(at + half, _mm512_fmadd_ps(first, sine, _mm512_mul_ps(second, cosine)));
      }
    }
}

// inner[m, width] = silu(gate) · up of gate_up[m, 2 width]; width is a multiple of 16.
void gate(const bf16 *gate_up, bf16 *inner, int64_t m, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (m > FEW)
  for (int64_t t = 0; t < m; t++)
    activate(gate_up + t * 2 * width, inner + t * width, 1, width, 0, width);
}
