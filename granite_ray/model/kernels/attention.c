// Attention of one query per sequence over the paged cache.

#include "vectors.h"

// Where a sequence's keys or values of one head stand: block after block, `row` apart.
typedef struct {
  const bf16 *head;
  const int32_t *blocks;
  int64_t block_size, row;
} Paged;

INLINE const bf16 *position(const Paged *cache, int64_t p) {
  int64_t block = cache->blocks[p / cache->block_size];
  return cache->head + (block * cache->block_size + p % cache->block_size) * cache->row;
}

// scores[h][p] = scale · query h · key p; four positions at once, all in one block.
static void score(const bf16 *queries, const Paged *keys, int64_t num_keys, int64_t num_heads,
                  int64_t head_dim, float scale, float *scores, int64_t room) {
  __m128 sums[MAX_TOKENS];
  for (int64_t p = 0; p < num_keys; p += ROWS)
    for (int64_t h = 0; h < num_heads; h += MAX_TOKENS) {
      int64_t num = smaller(num_heads - h, MAX_TOKENS);
      multiply(position(keys, p), keys->row, queries + h * head_dim, head_dim, head_dim, num, sums);
      for (int64_t c = 0; c < num; c++)
        _mm_storeu_ps(scores + (h + c) * room + p, _mm_mul_ps(sums[c], _mm_set1_ps(scale)));
    }
}

// Make weights of scores, in place, the largest 1; return their sum. The rest of the last vector
// becomes zeros.
static float weigh(float *scores, int64_t num_keys) {
  int64_t end = (num_keys + 15) / 16 * 16;
  for (int64_t p = num_keys; p < end; p++) scores[p] = -INFINITY;
  __m512 most = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
  for (int64_t p = 16; p < end; p += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + p));
  most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t p = 0; p < end; p += 16) {
    __m512 weights = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + p), most));
    _mm512_storeu_ps(scores + p, weights);
    sum = _mm512_add_ps(sum, weights);
  }
  return _mm512_reduce_add_ps(sum);
}

// PIECE dimensions of out[h] = the mean of the values, by weight, for `num` heads.
INLINE void mix_fixed(const float *weights, int64_t room, const Paged *values, int64_t num_keys,
                      const float *sums, bf16 *out, int64_t head_dim, const int num) {
  enum { VECTORS = PIECE / 16 };
  __m512 acc[MAX_TOKENS][VECTORS];
  for (int h = 0; h < num; h++)
    for (int i = 0; i < VECTORS; i++) acc[h][i] = _mm512_setzero_ps();
  for (int64_t first = 0; first < num_keys; first += values->block_size) {
    const bf16 *at = position(values, first);
    int64_t last = smaller(first + values->block_size, num_keys);
    for (int64_t p = first; p < last; p++, at += values->row) {
      __m512 value[VECTORS];
      for (int i = 0; i < VECTORS; i++) value[i] = widen(at + 16 * i);
      for (int h = 0; h < num; h++) {
        __m512 weight = _mm512_set1_ps(weights[h * room + p]);
        for (int i = 0; i < VECTORS; i++) acc[h][i] = _mm512_fmadd_ps(weight, value[i], acc[h][i]);
      }
    }
  }
  for (int h = 0; h < num; h++) {
    __m512 share = _mm512_set1_ps(1.0f / sums[h]);
    for (int i = 0; i < VECTORS; i++)
      narrow(out + h * head_dim + 16 * i, _mm512_mul_ps(acc[h][i], share));
  }
}

static void mix(const float *weights, int64_t room, const Paged *values, int64_t num_keys,
                const float *sums, bf16 *out, int64_t head_dim, int64_t num) {
  switch (num) {
    case 1: mix_fixed(weights, room, values, num_keys, sums, out, head_dim, 1); break;
    case 2: mix_fixed(weights, room, values, num_keys, sums, out, head_dim, 2); break;
    case 3: mix_fixed(weights, room, values, num_keys, sums, out, head_dim, 3); break;
    default: mix_fixed(weights, room, values, num_keys, sums, out, head_dim, 4);
  }
}

// One query of each sequence, of num_kv_heads · group heads, over its num_keys[s] cached positions.
// queries: rows query_stride apart; out[sequences, heads, head_dim]; caches [blocks, block_size,
// num_kv_heads, head_dim]; tables: table_stride block ids a sequence. scores: `room` numbers, a
// multiple of 16, for each thread and head of a group. block_size is a multiple of 4, head_dim of 64.
void attend(const bf16 *queries, int64_t query_stride, const bf16 *keys, const bf16 *values,
            const int32_t *tables, int64_t table_stride, const int64_t *num_keys,
            int64_t num_sequences, int64_t num_kv_heads, int64_t group, int64_t head_dim,
            int64_t block_size, float scale, float *scores, int64_t room, bf16 *out, int threads) {
  int64_t row = num_kv_heads * head_dim, width = row * group;
#pragma omp parallel num_threads(threads)
  {
    float *own = scores + omp_get_thread_num() * group * room;
    float sums[group];
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_sequences * num_kv_heads; task++) {
      int64_t s = task / num_kv_heads, g = task % num_kv_heads, at = g * group * head_dim;
      const int32_t *blocks = tables + s * table_stride;
      Paged key = {keys + g * head_dim, blocks, block_size, row};
      score(queries + s * query_stride + at, &key, num_keys[s], group, head_dim, scale, own, room);
      for (int64_t h = 0; h < group; h++) sums[h] = weigh(own + h * room, num_keys[s]);
      for (int64_t piece = 0; piece < head_dim; piece += PIECE) {
        Paged value = {values + g * head_dim + piece, blocks, block_size, row};
        for (int64_t h = 0; h < group; h += MAX_TOKENS)
          mix(own + h * room, room, &value, num_keys[s], sums + h,
              out + s * width + at + h * head_dim + piece, head_dim, smaller(group - h, MAX_TOKENS));
      }
    }
  }
}
