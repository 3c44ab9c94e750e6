"""Groups of rows → one step's tensors."""

# N rows of a group, L tokens of its longest row, T tokens of the step

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from granite_ray.quickstart.training.groups import Group


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that begin with the same tokens, as places among a step's flat tokens.

    Attributes:
        start: Where the shared tokens begin; the rows follow one another behind them.
        num_shared: How many they are.
        padded_NL: For each place of a padded table of rows, its token, counted in the rows.
        places: For each token of the rows, its place in the padded table.
    """

    start: int
    num_shared: int
    padded_NL: torch.Tensor
    places: torch.Tensor

    @property
    def stop(self) -> int:
        """Where the next group begins."""
        return self.start + self.num_shared + self.places.numel()

    def to(self, device: torch.device) -> "RowGroup":
        """Return it on a device."""
        return replace(self, padded_NL=self.padded_NL.to(device), places=self.places.to(device))


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens, and what is learnt from them.

    Attributes:
        token_ids_T: All groups' tokens.
        positions_T: Of each token in its row, the shared beginning counted.
        groups: Which tokens see each other.
        read: The tokens after which something is predicted …
        targets: … what should follow …
        weights: … and how much that matters.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    groups: tuple[RowGroup, ...]
    read: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device."""
        return Batch(
            self.token_ids_T.to(device),
            self.positions_T.to(device),
            tuple(group.to(device) for group in self.groups),
            self.read.to(device),
            self.targets.to(device),
            self.weights.to(device),
        )


def make_batch(groups: Sequence[Group]) -> Batch:
    """Lay groups out as flat tokens; what is learnt keeps the order of groups and rows."""
    token_ids: list[int] = []
    positions: list[int] = []
    weights: list[float] = []
    laid: list[RowGroup] = []
    for group in groups:
        num_shared = len(group.shared)
        laid.append(_lay(group, len(token_ids)))
        token_ids += group.shared
        positions += range(num_shared)
        weights += [0.0] * num_shared
        for row in group.rows:
            token_ids += row.token_ids
            positions += range(num_shared, num_shared + len(row.token_ids))
            weights += row.weights
    learnt = [at for at, weight in enumerate(weights) if weight]
    return Batch(
        torch.tensor(token_ids),
        torch.tensor(positions),
        tuple(laid),
        torch.tensor([at - 1 for at in learnt]),
        torch.tensor([token_ids[at] for at in learnt]),
        torch.tensor([weights[at] for at in learnt]),
    )


def _lay(group: Group, start: int) -> RowGroup:
    width = max(len(row.token_ids) for row in group.rows)
    padded: list[int] = []
    places: list[int] = []
    for number, row in enumerate(group.rows):
        size, first = len(row.token_ids), len(places)
        padded += [*range(first, first + size), *[0] * (width - size)]
        places += range(number * width, number * width + size)
    table = torch.tensor(padded).view(len(group.rows), width)
    return RowGroup(start, len(group.shared), table, torch.tensor(places))
