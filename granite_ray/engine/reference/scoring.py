"""Prompts with choices → the log-probability of each choice: one prefill, then short branches.

The first token of every choice is read from the prompt's own logits. The rest is computed in
branches of the prompt's cache, one for each distinct beginning, in groups of bounded size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from granite_ray.config import EngineConfig
from granite_ray.engine.choices import plan_branches
from granite_ray.engine.reference.token_rows import TokenRows
from granite_ray.engine.requests import ScoreRequest

MAX_SCORED_TOKENS = 512
"""Bounds the logits of one group: a token costs 0.4 MB with a vocabulary of 100,000."""


@dataclass(frozen=True, slots=True)
class RowBranch:
    """A branch of one row's prompt."""

    row: int
    token_ids: tuple[int, ...]
    choice_indexes: tuple[int, ...]


@torch.inference_mode()
def score_choices(
    model: Any, requests: Sequence[ScoreRequest], config: EngineConfig
) -> list[list[float]]:
    """Return for each request the log-probability of each of its choices."""
    scores = [[0.0] * len(request.choices) for request in requests]
    rows = TokenRows(model, [request.prompt.token_ids for request in requests])
    first = rows.next_logits.log_softmax(dim=-1)
    branches = [
        RowBranch(row, branch.token_ids, branch.choice_indexes)
        for row, request in enumerate(requests)
        for branch in plan_branches(tuple(request.choices))
    ]
    for group in _groups(branches, rows.width, config):
        later = _log_probabilities_along(rows, group)
        for branch, along in zip(group, later, strict=True):
            log_probabilities = torch.cat([first[branch.row, None], along])
            for index in branch.choice_indexes:
                choice = list(requests[branch.row].choices[index])
                picked = log_probabilities[range(len(choice)), choice]
                scores[branch.row][index] = float(picked.sum())
    return scores


def _groups(
    branches: list[RowBranch], prompt_width: int, config: EngineConfig
) -> Iterator[list[RowBranch]]:
    """Cut branches into groups whose rows fit memory; branches of like length go together."""
    group: list[RowBranch] = []
    for branch in sorted(branches, key=lambda branch: len(branch.token_ids)):
        width, num_rows = len(branch.token_ids), len(group) + 1
        if group and (
            num_rows > config.max_num_seqs
            or num_rows * (prompt_width + width) > config.max_num_batched_tokens
            or num_rows * width > MAX_SCORED_TOKENS
        ):
            yield group
            group = []
        group.append(branch)
    if group:
        yield group


def _log_probabilities_along(rows: TokenRows, group: list[RowBranch]) -> torch.Tensor:
    """Return log-probabilities after each token of each branch: [branches, tokens, vocabulary]."""
    if not group[-1].token_ids:  # one-token choices: nothing to append
        return rows.next_logits.new_empty(len(group), 0, rows.next_logits.shape[-1])
    grown = rows.branch([branch.row for branch in group])
    return grown.extend([branch.token_ids for branch in group]).log_softmax(dim=-1)
