// Routed experts of few tokens.

#include "vectors.h"

// Pairs of a token and one of its experts, sorted by expert: those of expert e are starts[e] and up.
typedef struct {
  int64_t *tokens, *starts, *used, num_used;
} Pairs;

static void sort_by_expert(const int64_t *expert_ids, int64_t num_tokens, int64_t num_chosen,
                           int64_t num_experts, int64_t *pair_rows, Pairs *pairs) {
  int64_t next[num_experts + 1];
  for (int64_t e = 0; e <= num_experts; e++) next[e] = 0;
  for (int64_t i = 0; i < num_tokens * num_chosen; i++)
    if (expert_ids[i] < num_experts) next[expert_ids[i] + 1]++;
  pairs->num_used = 0;
  for (int64_t e = 0; e < num_experts; e++) {
    if (next[e + 1]) pairs->used[pairs->num_used++] = e;
    next[e + 1] += next[e];
  }
  for (int64_t e = 0; e <= num_experts; e++) pairs->starts[e] = next[e];
  for (int64_t i = 0; i < num_tokens * num_chosen; i++) {
    pair_rows[i] = expert_ids[i] < num_experts ? next[expert_ids[i]]++ : -1;
    if (pair_rows[i] >= 0) pairs->tokens[pair_rows[i]] = i / num_chosen;
  }
}

// out[t] = the sum, by weight, of what the experts of each token say: gated MLPs.
// x, out: [num_tokens, size]; expert_ids, weights: [num_tokens, num_chosen], an id of num_experts
// stands for none; w_in: [num_experts, 2 width, size], gate half first; w_out: [num_experts, size,
// width]; room: num_tokens · num_chosen · (2 size + 3 width) numbers. width is a multiple of
// ROWS_A_TASK.
void experts(const bf16 *x, const int64_t *expert_ids, const bf16 *weights, int64_t num_tokens,
             int64_t num_chosen, int64_t num_experts, const bf16 *w_in, const bf16 *w_out,
             bf16 *room, bf16 *out, int64_t size, int64_t width, int threads) {
  int64_t num_pairs = num_tokens * num_chosen;
  int64_t tokens[num_pairs + 1], rows[num_pairs + 1], starts[num_experts + 1], used[num_experts];
  Pairs pairs = {tokens, starts, used, 0};
  sort_by_expert(expert_ids, num_tokens, num_chosen, num_experts, rows, &pairs);
  bf16 *asked = room, *said = asked + num_pairs * size;
  bf16 *gate_up = said + num_pairs * size, *inner = gate_up + num_pairs * 2 * width;
  int64_t in_tasks = width / ROWS_A_TASK, out_tasks = (size + ROWS_A_TASK - 1) / ROWS_A_TASK;
  int64_t num_weights = 3 * pairs.num_used * size * width;
#pragma omp parallel num_threads(crew(num_pairs / larger(1, pairs.num_used), num_weights, threads))
  {
#pragma omp for
    for (int64_t p = 0; p < starts[num_experts]; p++)
      memcpy(asked + p * size, x + tokens[p] * size, size * sizeof(bf16));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs.num_used * in_tasks; task++) {
      int64_t e = used[task / in_tasks], at = starts[e], num = starts[e + 1] - at;
      int64_t first = task % in_tasks * ROWS_A_TASK, last = first + ROWS_A_TASK;
      const bf16 *w = w_in + e * 2 * width * size;
      bf16 *between = gate_up + at * 2 * width;
      product(asked + at * size, w, between, num, size, 2 * width, first, last);
      product(asked + at * size, w, between, num, size, 2 * width, width + first, width + last);
      activate(between, inner + at * width, num, width, first, last);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs.num_used * out_tasks; task++) {
      int64_t e = used[task / out_tasks], at = starts[e], num = starts[e + 1] - at;
      int64_t first = task % out_tasks * ROWS_A_TASK, last = smaller(first + ROWS_A_TASK, size);
      const bf16 *w = w_out + e * size * width;
      product(inner + at * width, w, said + at * size, num, width, size, first, last);
    }
#pragma omp for
    for (int64_t t = 0; t < num_tokens; t++)
      for (int64_t i = 0; i < size; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = t * num_chosen; c < (t + 1) * num_chosen; c++) {
          if (rows[c] < 0) continue;
          __m512 weight = _mm512_set1_ps(number(weights[c]));
          sum = _mm512_fmadd_ps(weight, widen(said + rows[c] * size + i), sum);
        }
        narrow(out + t * size + i, sum);
      }
  }
}

// For each row of scores[num_tokens, num_experts]: the num_chosen largest, their softmax as
// weights, and where they stand, largest first; the first of equals.
void route(const bf16 *scores, int64_t num_tokens, int64_t num_experts, int64_t num_chosen,
           int64_t *expert_ids, bf16 *weights) {
  for (int64_t t = 0; t < num_tokens; t++) {
    float left[num_experts], sum = 0, most = 0;
    int64_t *ids = expert_ids + t * num_chosen;
    for (int64_t e = 0; e < num_experts; e++) left[e] = number(scores[t * num_experts + e]);
    float shares[num_chosen];
    for (int64_t c = 0; c < num_chosen; c++) {
      int64_t best = 0;
      for (int64_t e = 1; e < num_experts; e++)
        if (left[e] > left[best]) best = e;
      if (c == 0) most = left[best];
      sum += shares[c] = expf(left[best] - most);
      ids[c] = best;
      left[best] = -INFINITY;
    }
    for (int64_t c = 0; c < num_chosen; c++)
      weights[t * num_chosen + c] = bf16_of(shares[c] / sum);
  }
}
