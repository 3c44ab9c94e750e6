"""Logits → one token id a sequence, as its sampling parameters and its grammar want it.

What is drawn depends on a sequence's own logits and seed, not on its neighbours or the device.
"""

# L sequences, V vocabulary, M of the sequences that have masks, B bytes of a mask,
# P pairs of a sequence and a token, S of the sequences that are sampled, C candidates

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from granite_ray.engine.continuation import Continuation
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.records import SamplingParams, TokenLogprobs

NUM_CANDIDATES = 1024
"""Among so many likeliest tokens `top_p` looks first: a whole vocabulary takes long to sort."""

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
REFUSALS = torch.from_numpy(np.where(BITS == 1, np.float32(0), np.float32(-np.inf)))
"""What a byte of a mask adds to the logits of its eight tokens: [256, 8]."""


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens the grammars of some sequences allow next.

    Attributes:
        rows: Places of these sequences in the list that was asked for.
        packed_MB: One bit a token, lowest bit first.
    """

    rows: list[int]
    packed_MB: NDArray[np.uint8]


def compute_masks(continuations: Sequence[Continuation], grammars: GrammarCompiler) -> TokenMasks:
    """Compute what grammars allow next: in another thread, while the forward pass runs.

    A sequence whose grammar breaks fails alone, and is finished then.
    """
    rows, matchers = [], []
    for row, continuation in enumerate(continuations):
        if continuation.matcher is not None and not continuation.is_finished:
            rows.append(row)
            matchers.append(continuation.matcher)
    masks = TokenMasks(rows, grammars.compute_masks(matchers))
    for row in rows:
        continuations[row].check_grammar()
    return masks


def choose_tokens(
    logits_LV: torch.Tensor, continuations: Sequence[Continuation], masks: TokenMasks
) -> list[int]:
    """Choose the next token of every sequence; of finished ones the choice means nothing."""
    if all(continuation.is_plain for continuation in continuations):
        return _likeliest(logits_LV)
    logits_LV = logits_LV.to(torch.float32, copy=True)
    _refuse(logits_LV, masks)
    _penalize_repetition(logits_LV, continuations)
    token_ids = _likeliest(logits_LV)
    rows = [row for row, one in enumerate(continuations) if one.request.sampling.temperature]
    if rows:
        sampled = [continuations[row] for row in rows]
        for row, token_id in zip(rows, _draw(logits_LV[rows], sampled), strict=True):
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


def weigh_tokens(logits_SV: torch.Tensor, samplings: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the weights by which tokens are drawn: probabilities, those filtered out being zero.

    Temperature, `top_k`, `top_p`, `min_p`, in this order and with the meaning they have in
    transformers' generate; but `top_p` keeps tokens that are exactly as likely as the last it
    needs, so that no order of sorting decides.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits_SV.device)[:, None]

    # From the largest on, so that no temperature, however low, makes an infinity.
    logits_SV = logits_SV - logits_SV.amax(dim=-1, keepdim=True)
    temperatures = column([sampling.temperature for sampling in samplings])
    weights_SV = (logits_SV / temperatures).softmax(dim=-1)
    top_k = [sampling.top_k for sampling in samplings]
    if any(top_k):
        weights_SV = _keep(weights_SV, _least_of_top_k(weights_SV, top_k))
    if any(sampling.top_p < 1 for sampling in samplings):
        top_p_S1 = column([sampling.top_p for sampling in samplings])
        weights_SV = _keep(weights_SV, _least_of_top_p(weights_SV, top_p_S1))
    if any(sampling.min_p for sampling in samplings):
        min_p_S1 = column([sampling.min_p for sampling in samplings])
        weights_SV = _keep(weights_SV, min_p_S1 * weights_SV.amax(dim=-1, keepdim=True))
    return weights_SV


def _likeliest(logits_LV: torch.Tensor) -> list[int]:
    token_ids: list[int] = logits_LV.argmax(dim=-1).tolist()
    return token_ids


def _refuse(logits_LV: torch.Tensor, masks: TokenMasks) -> None:
    """Make minus infinities of what grammars refuse, in place."""
    if not masks.rows:
        return
    device, vocab_size = logits_LV.device, logits_LV.shape[1]
    bytes_MB = torch.from_numpy(masks.packed_MB).to(device, torch.int32)
    refusals = REFUSALS.to(device).index_select(0, bytes_MB.view(-1))
    refusals_MV = refusals.view(len(masks.rows), -1)[:, :vocab_size]
    logits_LV.index_add_(0, torch.tensor(masks.rows, device=device), refusals_MV)


def _penalize_repetition(logits_LV: torch.Tensor, continuations: Sequence[Continuation]) -> None:
    """Make tokens that a sequence has already less likely, in place."""
    rows: list[int] = []
    token_ids: list[int] = []
    penalties: list[float] = []
    for row, continuation in enumerate(continuations):
        if continuation.seen_token_ids is not None:
            seen = continuation.seen_token_ids
            rows += [row] * len(seen)
            token_ids += seen
            penalties += [continuation.request.sampling.repetition_penalty] * len(seen)
    if not rows:
        return
    device = logits_LV.device
    places = torch.tensor([rows, token_ids], device=device)
    penalties_P = torch.tensor(penalties, device=device)
    logits_P = logits_LV[places[0], places[1]]
    penalized_P = torch.where(logits_P < 0, logits_P * penalties_P, logits_P / penalties_P)
    logits_LV[places[0], places[1]] = penalized_P


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

    Only where the first candidates do not reach that far is the whole vocabulary sorted.
    """
    is_asked_S1 = top_p_S1 < 1
    aims_S1 = top_p_S1 * weights_SV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    for num_candidates in (min(NUM_CANDIDATES, weights_SV.shape[1]), weights_SV.shape[1]):
        largest_SC = weights_SV.topk(num_candidates).values
        sums_SC = largest_SC.cumsum(dim=-1, dtype=torch.float64)
        if ((sums_SC[:, -1:] >= aims_S1) | ~is_asked_S1).all():
            break
    num_kept = ((sums_SC - largest_SC) < aims_S1).sum(dim=-1, keepdim=True).clamp(min=1)
    return largest_SC.gather(1, num_kept - 1) * is_asked_S1
