// Attention of one query per sequence over the paged cache.

#include "vectors.h"

enum { SPAN = 16 };  // positions of all heads that are taken together, since they stand together

// A sequence's keys or values, of some heads: block after block, its positions `row` apart.
typedef struct {
  const bf16 *heads;
  const int32_t *blocks;
  int64_t block_size, row, num;
} Paged;

INLINE const bf16 *position(const Paged *cache, int64_t p) {
  int64_t block = cache->blocks[p / cache->block_size];
  return cache->heads + (block * cache->block_size + p % cache->block_size) * cache->row;
}

// How many positions from p on are taken together: a multiple of ROWS but for the last.
INLINE int64_t span(const Paged *cache, int64_t p) {
  int64_t in_block = cache->block_size - p % cache->block_size;
  return smaller(smaller(SPAN, in_block), cache->num - p);
}

// What to fetch while `taken` positions from p on are worked on; NULL where nothing follows.
INLINE const char *following(const Paged *cache, int64_t p, int64_t taken, int64_t size) {
  bool is_whole = size == cache->row;  // else most of it would be other tasks'
  return is_whole && p + taken < cache->num ? (const char *)position(cache, p + taken) : NULL;
}

// The heads of a task: `group` queries for each of num_kv_heads.
typedef struct {
  int64_t num_kv_heads, group, head_dim;
} Heads;

// scores[h][p] = scale · query h · its key p.
static void score(const bf16 *queries, const Paged *keys, const Heads *of, float scale,
                  float *scores, int64_t room) {
  __m128 sums[MAX_TOKENS];
  int64_t taken, fetched = ROWS * of->head_dim * sizeof(bf16);
  for (int64_t p = 0; p < keys->num; p += taken) {
    taken = span(keys, p);
    const bf16 *at = position(keys, p);
    const char *ahead = following(keys, p, taken, of->num_kv_heads * of->head_dim);
    for (int64_t g = 0; g < of->num_kv_heads; g++)
      for (int64_t q = 0; q < taken; q += ROWS) {
        const bf16 *key = at + q * keys->row + g * of->head_dim;
        for (int64_t h = 0; h < of->group; h += MAX_TOKENS) {
          int64_t head = g * of->group + h, num = smaller(of->group - h, MAX_TOKENS);
          multiply(key, keys->row, queries + head * of->head_dim, of->head_dim, of->head_dim, num,
                   h ? NULL : ahead, sums);
          for (int64_t c = 0; c < num; c++) {
            __m128 scaled = _mm_mul_ps(sums[c], _mm_set1_ps(scale));
            _mm_storeu_ps(scores + (head + c) * room + p + q, scaled);
          }
        }
        if (ahead) ahead += fetched;
      }
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

// Add to PIECE dimensions of `num` heads what `taken` values give, by weight.
INLINE void mix_fixed(const float *weights, int64_t room, const bf16 *value, int64_t row,
                      int64_t taken, const int num, const char *ahead, float *mixed) {
  enum { VECTORS = PIECE / 16 };
  __m512 acc[MAX_TOKENS][VECTORS];
  for (int h = 0; h < num; h++)
    for (int i = 0; i < VECTORS; i++) acc[h][i] = _mm512_loadu_ps(mixed + h * room + 16 * i);
  for (int64_t p = 0; p < taken; p++, value += row) {
    __m512 piece[VECTORS];
    for (int i = 0; i < VECTORS; i++) piece[i] = widen(value + 16 * i);
    if (ahead)
      for (int i = 0; i < PIECE; i += WIDE, ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T0);
    for (int h = 0; h < num; h++) {
      __m512 weight = _mm512_set1_ps(weights[h * room + p]);
      for (int i = 0; i < VECTORS; i++) acc[h][i] = _mm512_fmadd_ps(weight, piece[i], acc[h][i]);
    }
  }
  for (int h = 0; h < num; h++)
    for (int i = 0; i < VECTORS; i++) _mm512_storeu_ps(mixed + h * room + 16 * i, acc[h][i]);
}

static void mix_heads(const float *weights, int64_t room, const bf16 *value, int64_t row,
                      int64_t taken, int64_t num, const char *ahead, float *mixed) {
  switch (num) {
    case 1: mix_fixed(weights, room, value, row, taken, 1, ahead, mixed); break;
    case 2: mix_fixed(weights, room, value, row, taken, 2, ahead, mixed); break;
    case 3: mix_fixed(weights, room, value, row, taken, 3, ahead, mixed); break;
    default: mix_fixed(weights, room, value, row, taken, 4, ahead, mixed);
  }
}

// mixed[h] = the sum of values, by weight; rows of weights and of mixed are `room` apart.
static void mix(const float *weights, int64_t room, const Paged *values, const Heads *of,
                float *mixed) {
  int64_t num_heads = of->num_kv_heads * of->group, taken;
  for (int64_t h = 0; h < num_heads; h++) memset(mixed + h * room, 0, of->head_dim * sizeof(float));
  for (int64_t p = 0; p < values->num; p += taken) {
    taken = span(values, p);
    const bf16 *at = position(values, p);
    const char *ahead = following(values, p, taken, of->num_kv_heads * of->head_dim);
    for (int64_t g = 0; g < of->num_kv_heads; g++)
      for (int64_t piece = 0; piece < of->head_dim; piece += PIECE) {
        const bf16 *value = at + g * of->head_dim + piece;
        for (int64_t h = 0; h < of->group; h += MAX_TOKENS) {
          int64_t head = g * of->group + h, num = smaller(of->group - h, MAX_TOKENS);
          mix_heads(weights + head * room + p, room, value, values->row, taken, num,
                    h ? NULL : ahead, mixed + head * room + piece);
        }
        if (ahead) ahead += taken * PIECE * sizeof(bf16);
      }
  }
}

// One query of each sequence, of num_kv_heads · group heads, over its num_keys[s] cached positions.
// queries: rows query_stride apart; out[sequences, heads, head_dim]; caches [blocks, block_size,
// num_kv_heads, head_dim]; tables: table_stride block ids a sequence. A sequence's heads are divided
// into `parts`: whole positions are read fastest, but few sequences leave threads idle. scores: for
// each thread and head of a part `room` numbers, a multiple of 16, head_dim more than any
// num_keys[s] rounded up to one. block_size is a multiple of 4, head_dim of 64.
void attend(const bf16 *queries, int64_t query_stride, const bf16 *keys, const bf16 *values,
            const int32_t *tables, int64_t table_stride, const int64_t *num_keys,
            int64_t num_sequences, int64_t num_kv_heads, int64_t group, int64_t head_dim,
            int64_t block_size, float scale, int64_t parts, float *scores, int64_t room, bf16 *out,
            int threads) {
  int64_t row = num_kv_heads * head_dim, num_heads = num_kv_heads * group;
  int64_t heads_a_part = (num_kv_heads + parts - 1) / parts * group;
  int64_t num_read = 0;
  for (int64_t s = 0; s < num_sequences; s++) num_read += 2 * num_keys[s] * row;
#pragma omp parallel num_threads(crew(group, num_read, threads))
  {
    float *own = scores + omp_get_thread_num() * heads_a_part * room;
    float *mixed = own + room - head_dim;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_sequences * parts; task++) {
      int64_t s = task / parts, part = task % parts;
      int64_t g = part * num_kv_heads / parts, end = (part + 1) * num_kv_heads / parts;
      Heads of = {end - g, group, head_dim};
      const int32_t *blocks = tables + s * table_stride;
      Paged key = {keys + g * head_dim, blocks, block_size, row, num_keys[s]};
      Paged value = {values + g * head_dim, blocks, block_size, row, num_keys[s]};
      score(queries + s * query_stride + g * group * head_dim, &key, &of, scale, own, room);
      float shares[heads_a_part];
      for (int64_t h = 0; h < of.num_kv_heads * group; h++)
        shares[h] = 1.0f / weigh(own + h * room, num_keys[s]);
      mix(own, room, &value, &of, mixed);
      for (int64_t h = 0; h < of.num_kv_heads * group; h++)
        for (int64_t i = 0; i < head_dim; i += 16) {
          __m512 mean = _mm512_loadu_ps(mixed + h * room + i);
          bf16 *at = out + (s * num_heads + g * group + h) * head_dim + i;
          narrow(at, _mm512_mul_ps(mean, _mm512_set1_ps(shares[h])));
        }
    }
  }
}
