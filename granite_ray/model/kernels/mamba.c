// A Mamba2 mixer, one token of each sequence.

#include "vectors.h"

// A mixer's sizes and parameters; see model/mamba.py. channels: num_heads · head_dim + 2 · groups ·
// state_size, of which x stands first, then B, then C.
typedef struct {
  int64_t num_heads, head_dim, groups, state_size, conv_width;
  const bf16 *conv_weight, *conv_bias, *dt_bias, *a_log, *d, *norm_weight;
  float eps, min_dt, max_dt;
} Mamba;

// out[channels]: the convolution's newest token; its inputs move on by one.
static void convolve(const Mamba *mamba, const bf16 *input, bf16 *state, float *out,
                     int64_t channels) {
  int64_t width = mamba->conv_width, kept = width - 1;
  for (int64_t c = 0; c < channels; c++) {
    const bf16 *weight = mamba->conv_weight + c * width;
    bf16 *past = state + c * kept;
    float sum = mamba->conv_bias ? number(mamba->conv_bias[c]) : 0.0f;
    for (int64_t k = 0; k < kept; k++) sum += number(past[k]) * number(weight[k]);
    out[c] = sum + number(input[c]) * number(weight[kept]);
    for (int64_t k = 1; k < kept; k++) past[k - 1] = past[k];
    if (kept) past[kept - 1] = input[c];
  }
  for (int64_t c = 0; c < channels; c += 16)
    _mm512_storeu_ps(out + c, silu(_mm512_loadu_ps(out + c)));
}

// The state of one head decays, takes in x · dt · B, and is read by C: y[head_dim].
static void move_head(const Mamba *mamba, const float *x, const float *b, const float *c, float dt,
                      int64_t head, float *state, float *y) {
  const float decay = expf(-expf(number(mamba->a_log[head])) * dt), skip = number(mamba->d[head]);
  const int64_t size = mamba->state_size;
  for (int64_t m = 0; m < mamba->head_dim; m += ROWS) {
    __m512 read[ROWS];
    for (int r = 0; r < ROWS; r++) {
      float *row = state + (m + r) * size;
      const __m512 given = _mm512_set1_ps(x[m + r] * dt);
      read[r] = _mm512_setzero_ps();
      for (int64_t i = 0; i < size; i += 16) {
        __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(decay));
        __m512 now = _mm512_fmadd_ps(given, _mm512_loadu_ps(b + i), kept);
        _mm512_storeu_ps(row + i, now);
        read[r] = _mm512_fmadd_ps(now, _mm512_loadu_ps(c + i), read[r]);
      }
    }
    __m128 sums = sums_of_4(read[0], read[1], read[2], read[3]);
    _mm_storeu_ps(y + m, _mm_fmadd_ps(_mm_loadu_ps(x + m), _mm_set1_ps(skip), sums));
  }
}

// out[inner] = y · silu(gate), each group at unit mean square, times the norm's weight.
static void gate_and_norm(const Mamba *mamba, float *y, const bf16 *gate, bf16 *out) {
  int64_t inner = mamba->num_heads * mamba->head_dim, size = inner / mamba->groups;
  for (int64_t first = 0; first < inner; first += size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = first; i < first + size; i += 16) {
      __m512 value = _mm512_mul_ps(_mm512_loadu_ps(y + i), silu(widen(gate + i)));
      _mm512_storeu_ps(y + i, value);
      sum = _mm512_fmadd_ps(value, value, sum);
    }
    float square = _mm512_reduce_add_ps(sum) / size;
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(square + mamba->eps));
    for (int64_t i = first; i < first + size; i += 16) {
      __m512 normed = _mm512_mul_ps(_mm512_loadu_ps(y + i), scale);
      narrow(out + i, _mm512_mul_ps(normed, widen(mamba->norm_weight + i)));
    }
  }
}

// One token of each sequence: projected[sequences] rows of gate, channels and dt, row_stride apart;
// conv_state[slots, channels, conv_width - 1] and ssm_state[slots, heads, head_dim, state_size]
// move on; out[sequences, inner]. room: for each sequence channels + inner numbers. Sizes of heads,
// groups and states are multiples of 16.
void mamba_step(const Mamba *mamba, const bf16 *projected, int64_t row_stride,
                const int64_t *slots, int64_t num_sequences, bf16 *conv_state, float *ssm_state,
                float *room, bf16 *out, int threads) {
  const int64_t heads = mamba->num_heads, dim = mamba->head_dim, size = mamba->state_size;
  const int64_t inner = heads * dim, shared = mamba->groups * size, channels = inner + 2 * shared;
  float *convolved = room, *read = room + num_sequences * channels;
#pragma omp parallel num_threads(crew(1, 2 * num_sequences * inner * size, threads))
  {
#pragma omp for
    for (int64_t s = 0; s < num_sequences; s++)
      convolve(mamba, projected + s * row_stride + inner,
               conv_state + slots[s] * channels * (mamba->conv_width - 1),
               convolved + s * channels, channels);
#pragma omp for schedule(dynamic, 2)
    for (int64_t task = 0; task < num_sequences * heads; task++) {
      int64_t s = task / heads, h = task % heads, group = h / (heads / mamba->groups);
      const float *x = convolved + s * channels, *b = x + inner + group * size, *c = b + shared;
      float raw = number(projected[s * row_stride + inner + channels + h]);
      raw += number(mamba->dt_bias[h]);
      float dt = raw > 20.0f ? raw : log1pf(expf(raw));
      dt = fminf(fmaxf(dt, mamba->min_dt), mamba->max_dt);
      move_head(mamba, x + h * dim, b, c, dt, h, ssm_state + (slots[s] * heads + h) * dim * size,
                read + s * inner + h * dim);
    }
#pragma omp for
    for (int64_t s = 0; s < num_sequences; s++)
      gate_and_norm(mamba, read + s * inner, projected + s * row_stride, out + s * inner);
  }
}
