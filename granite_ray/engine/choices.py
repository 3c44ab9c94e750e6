"""The choices of one scoring request: what to append to its prompt, and what to read off it.

The first token of every choice is read from the prompt's own logits, the rest along branches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

MAX_PLANNED_CHOICES = 64
"""Different lists of choices whose branches are remembered: a job has a handful."""


@dataclass(frozen=True, slots=True)
class Branch:
    """What is appended to a prompt, and the choices that can be read off it."""

    token_ids: tuple[int, ...]
    choice_indexes: tuple[int, ...]


@lru_cache(MAX_PLANNED_CHOICES)
def plan_branches(choices: tuple[tuple[int, ...], ...]) -> tuple[Branch, ...]:
    """Return the branches of some choices, those with common beginnings side by side.

    A choice's last token need not be appended, and what begins a longer branch is no branch of
    its own: sorted backwards, a beginning comes right after what it begins. The empty branch, for
    choices of one token, is the last one where no other begins with it.
    """
    bodies: dict[tuple[int, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        bodies.setdefault(choice[:-1], []).append(index)
    branches: dict[tuple[int, ...], tuple[int, ...]] = {}
    branch: tuple[int, ...] = ()
    for body in sorted(bodies, reverse=True):
        if branch[: len(body)] != body:
            branch = body
        branches[branch] = branches.get(branch, ()) + tuple(bodies[body])
    return tuple(Branch(*item) for item in branches.items())


@dataclass(frozen=True, slots=True)
class Trie:
    """Branches of one prompt with their common beginnings told once, parents before children.

    Attributes:
        token_ids: One for each node.
        parents: The node before each; -1 where the prompt is before it.
        paths: For each branch, its nodes.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


@lru_cache(MAX_PLANNED_CHOICES)
def make_trie(branches: tuple[tuple[int, ...], ...]) -> Trie:
    """Return the trie of some branches' token ids."""
    nodes: dict[tuple[int, int], int] = {}  # parent and token id → node
    paths = []
    for branch in branches:
        path, node = [], -1
        for token_id in branch:
            node = nodes.setdefault((node, token_id), len(nodes))
            path.append(node)
        paths.append(tuple(path))
    token_ids = tuple(token_id for _, token_id in nodes)
    return Trie(token_ids, tuple(parent for parent, _ in nodes), tuple(paths))


@dataclass(frozen=True, slots=True)
class Reading:
    """Which logits of a trie's nodes belong to which choice: three columns of the same length."""

    nodes: tuple[int, ...]
    token_ids: tuple[int, ...]
    choice_indexes: tuple[int, ...]


@lru_cache(MAX_PLANNED_CHOICES)
def plan_reading(choices: tuple[tuple[int, ...], ...], branches: tuple[Branch, ...]) -> Reading:
    """Return what to read along some of the choices' branches, for all tokens but the first."""
    trie = make_trie(tuple(branch.token_ids for branch in branches))
    rows = [
        (node, token_id, index)
        for branch, path in zip(branches, trie.paths, strict=True)
        for index in branch.choice_indexes
        for node, token_id in zip(path, choices[index][1:], strict=False)
    ]
    columns: Iterable[tuple[int, ...]] = zip(*rows, strict=True)
    return Reading(*columns)
