"""Logits → one token id a sequence, as its sampling parameters and its grammar want it.

What is drawn depends on a sequence's own logits and seed, not on its neighbours or the device.
"""

# L sequences, V vocabulary, S some of the sequences, M those of them that have masks,
# B bytes of a mask, P pairs of a sequence and a token, C candidates

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from granite_ray.engine.continuation import Continuation
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.records import SamplingParams, TokenLogprobs

NUM_CANDIDATES = 1024
"""Among so many likeliest tokens `top_p` looks first: a whole vocabulary takes long to sort."""
NUM_ROWS_IN_CACHE = 4
"""Rows that a CPU works on at once: a group of 4 stays in its cache, at 100,000 tokens a row."""

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
REFUSALS = torch.from_numpy(np.where(BITS == 1, np.float32(0), np.float32(-np.inf)))
"""What a byte of a mask adds to the logits of its eight tokens: [256, 8]."""


TokenMasks = dict[int, NDArray[np.uint8]]
"""Place of a sequence in the list that was asked for → what its grammar allows next, as bits."""


def compute_masks(continuations: Sequence[Continuation], grammars: GrammarCompiler) -> TokenMasks:
    """Compute what grammars allow next: in another thread, while the forward pass runs.

    A sequence whose grammar breaks fails alone, and is finished then.
    """
    matchers = {
        row: continuation.matcher
        for row, continuation in enumerate(continuations)
        if continuation.matcher is not None and not continuation.is_finished
    }
    masks = dict(zip(matchers, grammars.compute_masks(list(matchers.values())), strict=True))
    for row in masks:
        continuations[row].check_grammar()
    return masks


def choose_tokens(
    logits_LV: torch.Tensor, continuations: Sequence[Continuation], masks: TokenMasks
) -> list[int]:
    """Choose the next token of every sequence; of finished ones the choice means nothing."""
    token_ids = [-1] * len(continuations)
    if any(continuation.is_greedy for continuation in continuations):
        token_ids = logits_LV.argmax(dim=-1).tolist()
    # What is likeliest of all is likeliest of what a grammar allows, wherever it allows it.
    special = [
        row
        for row, continuation in enumerate(continuations)
        if not (continuation.is_greedy and _allows(masks.get(row), token_ids[row]))
    ]
    for rows in _groups(special, logits_LV.device):
        logits_SV = logits_LV.index_select(0, torch.tensor(rows, device=logits_LV.device))
        wishes = [(continuations[row], masks.get(row)) for row in rows]
        for row, token_id in zip(rows, _choose(logits_SV.float(), wishes), strict=True):
            token_ids[row] = token_id
    return token_ids


def read_logprobs(
    logits_LV: torch.Tensor, token_ids: Sequence[int], continuations: Sequence[Continuation]
) -> list[TokenLogprobs | None]:
    """Return the log-probabilities of the chosen tokens and their alternatives, where asked for.

    They are what the model says: `logits_LV` is as it came from the model.
    """
    wanted = [continuation.request.sampling.num_logprobs for continuation in continuations]
    found: list[TokenLogprobs | None] = [None] * len(wanted)
    rows = [row for row, num_top in enumerate(wanted) if num_top is not None]
    if not rows:
        return found
    logprobs_SV = logits_LV[rows].float().log_softmax(dim=-1)
    chosen = torch.tensor([token_ids[row] for row in rows], device=logits_LV.device)
    of_chosen: list[list[float]] = logprobs_SV.gather(1, chosen[:, None]).tolist()
    most = min(max(wanted[row] or 0 for row in rows), logits_LV.shape[1])
    top = logprobs_SV.topk(most)
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    for row, [logprob], (top_ids, top_logprobs) in zip(rows, of_chosen, alternatives, strict=True):
        pairs = tuple(zip(top_ids, top_logprobs, strict=True))
        found[row] = TokenLogprobs(token_ids[row], logprob, pairs[: wanted[row]])
    return found


def penalize_repetition(logits_LV: torch.Tensor, continuations: Sequence[Continuation]) -> None:
    """Make tokens that a sequence has seen less likely, in place, where that is asked for."""
    penalized = [row for row, one in enumerate(continuations) if one.seen_token_ids is not None]
    if not penalized:
        return
    seen = [np.array(continuations[row].seen_token_ids) for row in penalized]
    penalties = [continuations[row].request.sampling.repetition_penalty for row in penalized]
    lengths = [len(token_ids) for token_ids in seen]
    # A token may be there twice: both times its logit is read before any is written.
    places = np.repeat(penalized, lengths), np.concatenate(seen)
    rows_P, token_ids_P = (torch.from_numpy(place).to(logits_LV.device) for place in places)
    penalties_P = torch.tensor(np.repeat(penalties, lengths), dtype=torch.float32).to(rows_P.device)
    logits_P = logits_LV[rows_P, token_ids_P]
    penalized_P = torch.where(logits_P < 0, logits_P * penalties_P, logits_P / penalties_P)
    logits_LV[rows_P, token_ids_P] = penalized_P


def weigh_tokens(logits_SV: torch.Tensor, samplings: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the weights by which tokens are drawn, zero for those that are filtered out.

    Temperature, `top_k`, `top_p`, `min_p`, in this order and with the meaning they have in
    transformers' generate; but `top_p` keeps tokens that are exactly as likely as the last it
    needs, so that no order of sorting decides. The likeliest token weighs 1, whatever the sum.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits_SV.device)[:, None]

    # From the largest on: no temperature, however low, makes an infinity.
    weights_SV = logits_SV - logits_SV.amax(dim=-1, keepdim=True)
    weights_SV.div_(column([sampling.temperature for sampling in samplings])).exp_()
    top_k = [sampling.top_k for sampling in samplings]
    if any(top_k):
        weights_SV = _keep(weights_SV, _least_of_top_k(weights_SV, top_k))
    if any(sampling.top_p < 1 for sampling in samplings):
        top_p_S1 = column([sampling.top_p for sampling in samplings])
        weights_SV = _keep(weights_SV, _least_of_top_p(weights_SV, top_p_S1))
    if any(sampling.min_p for sampling in samplings):
        weights_SV = _keep(weights_SV, column([sampling.min_p for sampling in samplings]))
    return weights_SV


def _allows(mask: NDArray[np.uint8] | None, token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 8] >> token_id % 8 & 1)


def _groups(rows: list[int], device: torch.device) -> Iterator[list[int]]:
    """Cut rows into groups that are worked on together: on a CPU few, on a GPU all."""
    size = NUM_ROWS_IN_CACHE if device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _choose(
    logits_SV: torch.Tensor, wishes: list[tuple[Continuation, NDArray[np.uint8] | None]]
) -> list[int]:
    """Choose where the likeliest of all tokens does not do; overwrites `logits_SV`."""
    continuations = [continuation for continuation, _ in wishes]
    _refuse(logits_SV, [mask for _, mask in wishes])
    penalize_repetition(logits_SV, continuations)
    token_ids: list[int] = logits_SV.argmax(dim=-1).tolist()
    sampled = [row for row, one in enumerate(continuations) if one.request.sampling.temperature]
    if sampled:
        drawn = _draw(logits_SV[sampled], [continuations[row] for row in sampled])
        for row, token_id in zip(sampled, drawn, strict=True):
            token_ids[row] = token_id
    return token_ids


def _refuse(logits_SV: torch.Tensor, masks: list[NDArray[np.uint8] | None]) -> None:
    """Make minus infinities of what grammars refuse, in place."""
    given = {row: mask for row, mask in enumerate(masks) if mask is not None}
    if not given:
        return
    device = logits_SV.device
    bytes_MB = torch.from_numpy(np.stack(list(given.values()))).to(device, torch.int32)
    refusals = REFUSALS.to(device).index_select(0, bytes_MB.view(-1))
    refusals_MV = refusals.view(len(given), -1)[:, : logits_SV.shape[1]]
    logits_SV.index_add_(0, torch.tensor(list(given), device=device), refusals_MV)


def _draw(logits_SV: torch.Tensor, continuations: Sequence[Continuation]) -> list[int]:
    """Draw each sequence's token at the place in its distribution that its number points to."""
    samplings = [continuation.request.sampling for continuation in continuations]
    # Sums in double precision: in single precision rare tokens at the far end would be lost.
    sums_SV = weigh_tokens(logits_SV, samplings).cumsum(dim=-1, dtype=torch.float64)
    numbers = [[continuation.number] for continuation in continuations]
    numbers_S1 = torch.tensor(numbers, dtype=torch.float64, device=logits_SV.device)
    places_S1 = numbers_S1 * sums_SV[:, -1:]
    token_ids: list[int] = torch.searchsorted(sums_SV, places_S1, right=True)[:, 0].tolist()
    return token_ids


def _keep(weights_SV: torch.Tensor, least_S1: torch.Tensor) -> torch.Tensor:
    return torch.where(weights_SV < least_S1, 0, weights_SV)


def _least_of_top_k(weights_SV: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Return the k-th largest weight of each row; 0 where `top_k` is 0."""
    num_kept = torch.tensor(top_k, device=weights_SV.device)[:, None].clamp(max=weights_SV.shape[1])
    largest_SC = weights_SV.topk(int(num_kept.max())).values
    least_S1 = largest_SC.gather(1, (num_kept - 1).clamp(min=0))
    return least_S1 * (num_kept > 0)


def _least_of_top_p(weights_SV: torch.Tensor, top_p_S1: torch.Tensor) -> torch.Tensor:
    """Return the smallest of the largest weights that make up `top_p` of the sum; 0 where it is 1.

    It looks among few candidates first: only a flat distribution needs the whole vocabulary sorted.
    """
    vocab_size = weights_SV.shape[1]
    aims_S1 = top_p_S1 * weights_SV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    num_candidates = min(NUM_CANDIDATES, vocab_size)
    while True:
        largest_SC = weights_SV.topk(num_candidates).values
        sums_SC = largest_SC.cumsum(dim=-1, dtype=torch.float64)
        is_enough_S1 = (sums_SC[:, -1:] >= aims_S1) | (top_p_S1 >= 1)
        if num_candidates == vocab_size or is_enough_S1.all():
            break
        num_candidates = min(16 * num_candidates, vocab_size)
    num_kept_S1 = ((sums_SC - largest_SC) < aims_S1).sum(dim=-1, keepdim=True).clamp(min=1)
    return largest_SC.gather(1, num_kept_S1 - 1) * (top_p_S1 < 1)
