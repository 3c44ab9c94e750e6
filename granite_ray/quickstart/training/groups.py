"""Groups of rows that begin with the same tokens, and which texts are asked about together."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from granite_ray.quickstart.training.prompts import PromptShape
from granite_ray.quickstart.training.timetable import Kind

GROUP_TOKENS = 1_300
"""About what a group takes, its prompt not counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens after what a group shares; `weights` say how much predicting each one counts."""

    token_ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that begin with the same tokens."""

    kind: Kind
    shared: tuple[int, ...]
    rows: list[Row]

    @property
    def num_tokens(self) -> int:
        """Tokens computed for it."""
        return len(self.shared) + sum(len(row.token_ids) for row in self.rows)


def ask_about(
    kind: Kind,
    shape: PromptShape,
    texts: Sequence[Sequence[int]],
    answers: Sequence[Row],
    reading_weight: Callable[[], float],
) -> Group:
    """Ask the same of each text, as long as there is room.

    Args:
        kind: What is asked.
        shape: The prompt around each text.
        texts: Token ids.
        answers: What should follow, the end of the turn included.
        reading_weight: Draws what predicting a token of a text counts.
    """
    rows: list[Row] = []
    room = GROUP_TOKENS
    for text, answer in zip(texts, answers, strict=True):
        if room < 0:
            break  # a prompt that comes after each text takes more than its share
        token_ids = [*text, *shape.after, *answer.token_ids]
        weights = [reading_weight() for _ in text]
        weights += [0.0] * len(shape.after) + answer.weights
        weights[0] = 0.0  # what comes before it belongs to the whole group
        rows.append(Row(token_ids, weights))
        room -= len(token_ids)
    return Group(kind, shape.before, rows)


class Epochs:
    """Texts of one kind in groups of about the same length, each text once an epoch."""

    def __init__(self, kind: Kind, sizes: Sequence[int], seed: int) -> None:
        """Group texts of these sizes, in tokens with their answers."""
        self._kind, self._sizes, self._seed = kind, sizes, seed
        self._drawn: list[list[list[int]]] = []

    def indexes(self, place: int) -> list[int]:
        """Return which texts are in a group, counted from the first epoch's first."""
        number = 0
        while place >= len(groups := self.groups(number)):
            place -= len(groups)
            number += 1
        return groups[place]

    def groups(self, number: int) -> list[list[int]]:
        """Return all groups of an epoch."""
        while number >= len(self._drawn):
            self._drawn.append(self._draw(len(self._drawn)))
        return self._drawn[number]

    def _draw(self, number: int) -> list[list[int]]:
        lot = random.Random(f"{self._seed} {self._kind} {number}")
        sizes = self._sizes
        order = sorted(range(len(sizes)), key=lambda index: sizes[index] * lot.uniform(0.95, 1.05))
        groups: list[list[int]] = [[]]
        room = GROUP_TOKENS
        for index in order:
            if room < sizes[index] and groups[-1]:
                groups.append([])
                room = GROUP_TOKENS
            groups[-1].append(index)
            room -= sizes[index]
        lot.shuffle(groups)
        for group in groups:
            lot.shuffle(group)
        return groups
