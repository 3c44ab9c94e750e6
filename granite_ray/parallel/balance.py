"""Which rank of a replica gets the next prompt: the one that is done with it first. Plain Python.

All ranks of a step wait for the slowest, so it is tokens that are balanced, not prompts.
"""

from collections import OrderedDict

from granite_ray.records import Prompt

MAX_PREFIXES = 1000
"""Shared beginnings remembered of each rank, the latest ones: a cache keeps no more for long."""


class RankBalance:
    """The tokens that each rank has before it, and the shared beginnings that it has computed."""

    def __init__(self, num_ranks: int) -> None:
        self._tokens = [0] * num_ranks
        self._prefixes: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_ranks)]

    def choose(self, prompt: Prompt, num_answer_tokens: int) -> tuple[int, int]:
        """Choose a rank; return it and the tokens that it is charged until `release`.

        A beginning that others share costs nothing where it was sent before.
        """
        prefixes = [(stop, hash(prompt.token_ids[:stop])) for stop in prompt.junctions]
        costs = []
        for known in self._prefixes:
            num_known = max((stop for stop, digest in prefixes if digest in known), default=0)
            costs.append(len(prompt.token_ids) - num_known + num_answer_tokens)
        ends = [before + cost for before, cost in zip(self._tokens, costs, strict=True)]
        rank = ends.index(min(ends))
        self._tokens[rank] += costs[rank]
        self._remember(self._prefixes[rank], [digest for _, digest in prefixes])
        return rank, costs[rank]

    def release(self, rank: int, num_tokens: int) -> None:
        """Take note that a rank is done with what it was charged."""
        self._tokens[rank] -= num_tokens

    def _remember(self, known: OrderedDict[int, None], digests: list[int]) -> None:
        for digest in digests:
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > MAX_PREFIXES:
            known.popitem(last=False)
