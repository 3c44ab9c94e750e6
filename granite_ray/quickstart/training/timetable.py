"""Which kinds of lessons each step of a training has. Knows no texts."""

from typing import Literal

Kind = Literal["section", "synopsis", "entry", "history", "copy"]
"""A package's section and synopsis, a changelog entry, a piece of a changelog, and nonsense."""

SHARES: dict[Kind, float] = {
    "section": 0.49,
    "synopsis": 0.1,
    "entry": 0.22,
    "history": 0.14,
    "copy": 0.05,
}
"""Shares of all groups."""
EARLY_COPY_SHARE = 0.5
"""Of the groups of the first phase: copying is learnt first, and carries the rest."""


def deal_groups(num_steps: int, num_early: int, num_groups: int) -> list[list[tuple[Kind, int]]]:
    """Deal kinds to steps by their shares; each comes with how many of its kind came before.

    Args:
        num_steps: How many steps the training has.
        num_early: The first of them that belong to copying.
        num_groups: Groups a step.
    """
    given: dict[Kind, int] = dict.fromkeys(SHARES, 0)
    owed: dict[Kind, float] = dict.fromkeys(SHARES, 0.0)
    steps = []
    for number in range(num_steps):
        copying = EARLY_COPY_SHARE if number < num_early else SHARES["copy"]
        others = 1 - SHARES["copy"]
        dealt = []
        for _ in range(num_groups):
            for kind, share in SHARES.items():
                owed[kind] += copying if kind == "copy" else share * (1 - copying) / others
            kind = max(owed, key=owed.__getitem__)
            owed[kind] -= 1
            dealt.append((kind, given[kind]))
            given[kind] += 1
        steps.append(dealt)
    return steps
