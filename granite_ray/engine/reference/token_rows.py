"""A batch of token rows that the model has seen, with its cache: the only module that calls it.

Rows are padded on the left and masked, so a row's numbers do not depend on its neighbours beyond
float rounding. That holds for Mamba layers too: a masked position enters their state as zero,
because Granite's Mamba projections have no bias.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

PADDING_TOKEN_ID = 0


class TokenRows:
    """Rows that grow together, each with its own length."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._cache: Any = None
        width = max(map(len, prompts))
        self._mask = torch.zeros(len(prompts), 0, dtype=torch.int64, device=model.device)
        token_ids = [[PADDING_TOKEN_ID] * (width - len(prompt)) + [*prompt] for prompt in prompts]
        is_real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.next_logits = self._forward(token_ids, is_real, num_logits=1)[:, -1]
        """For each row, the logits of the token that follows it, in float32."""

    @property
    def width(self) -> int:
        """Positions of a row, padding included."""
        return self._mask.shape[1]

    def append(self, token_ids: Sequence[int]) -> None:
        """Let every row grow by one token."""
        columns = [[token_id] for token_id in token_ids]
        self.next_logits = self._forward(columns, [[1]] * len(columns), num_logits=1)[:, -1]

    def extend(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        """Let every row grow by its piece; return the logits after each token of the pieces.

        Pieces are padded on the right, so this is the last thing to ask of these rows.
        """
        width = max(map(len, pieces))
        padded = [[*piece] + [PADDING_TOKEN_ID] * (width - len(piece)) for piece in pieces]
        is_real = [[1] * len(piece) + [0] * (width - len(piece)) for piece in pieces]
        return self._forward(padded, is_real, num_logits=width)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; a row named twice is there twice."""
        indexes = torch.tensor(rows, device=self._mask.device)
        self._cache.reorder_cache(indexes)
        self._mask = self._mask[indexes]
        self.next_logits = self.next_logits[indexes]

    def branch(self, rows: Sequence[int]) -> "TokenRows":
        """Return a copy of these rows, which grows on its own."""
        twin = copy.copy(self)
        twin._cache = copy.deepcopy(self._cache)
        twin.keep(rows)
        return twin

    def _forward(
        self, token_ids: list[list[int]], is_real: list[list[int]], num_logits: int
    ) -> torch.Tensor:
        device = self._mask.device
        self._mask = torch.cat([self._mask, torch.tensor(is_real, device=device)], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        output = self._model(
            input_ids=torch.tensor(token_ids, device=device),
            attention_mask=self._mask,
            position_ids=positions[:, -len(token_ids[0]) :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits.float()
        return logits
