"""The living state of one scoring request: log-probabilities added up as logits come in."""

from collections.abc import Sequence

import torch

from granite_ray.engine.choices import Branch, plan_branches, plan_reading
from granite_ray.engine.requests import ScoreRequest, settle


class Weighing:
    """Scores in the making.

    Attributes:
        branches: What is to be appended to the prompt, in this order; none is empty.
    """

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self._choices = tuple(request.choices)
        self._has_read_prompt = False
        self._scores = torch.zeros(len(self._choices), dtype=torch.float64)
        self.branches = tuple(b for b in plan_branches(self._choices) if b.token_ids)

    def read_prompt(self, logits_V: torch.Tensor) -> None:
        """Take the first token of every choice from the logits after the prompt.

        Once: a preempted sequence comes by here again.
        """
        if self._has_read_prompt:
            return
        self._has_read_prompt = True
        indexes = [index for index, choice in enumerate(self._choices) if choice]
        token_ids = [self._choices[index][0] for index in indexes]
        self._add(indexes, logits_V[None], [0] * len(indexes), token_ids)

    def read_branches(self, branches: Sequence[Branch], logits_NV: torch.Tensor) -> None:
        """Take the later tokens along some branches from the logits after each of their nodes."""
        reading = plan_reading(self._choices, tuple(branches))
        self._add(reading.choice_indexes, logits_NV, reading.nodes, reading.token_ids)

    def finish(self) -> None:
        """Give the caller the scores."""
        settle(self.request.future, self._scores.tolist())

    def _add(
        self,
        choice_indexes: Sequence[int],
        logits_NV: torch.Tensor,
        rows: Sequence[int],
        token_ids: Sequence[int],
    ) -> None:
        """Add the log-probability of each token, in its row's logits, to its choice's score."""
        picked = logits_NV[list(rows), list(token_ids)] - logits_NV.logsumexp(dim=-1)[list(rows)]
        self._scores.index_add_(
            0, torch.tensor(choice_indexes, dtype=torch.int64), picked.double().cpu()
        )
