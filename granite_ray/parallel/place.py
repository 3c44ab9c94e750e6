"""Where a rank stands among those of its replica, and where they meet. Plain data, no torch."""

from dataclasses import dataclass
from itertools import pairwise

from granite_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank's place.

    Attributes:
        rank: From 0, the leader, to `size` - 1.
        size: Ranks of the replica.
        host: Address of this rank's own node, on which the others reach it.
        meeting: Host and port of the leader's store, at which all ranks find each other.
        patience_s: How long a rank waits for the others to load.
        timeout_s: How long it waits for them in any exchange.
    """

    rank: int
    size: int
    host: str
    meeting: tuple[str, int]
    patience_s: float
    timeout_s: float


def check_size(size: int, num_experts: int) -> None:
    """Raise ConfigError where a checkpoint's experts cannot be divided over so many ranks."""
    if size > max(num_experts, 1):
        what = f"{num_experts} experts" if num_experts else "no experts"
        most = f"Choose at most {num_experts}." if num_experts else "Choose 1, and more replicas."
        raise ConfigError(
            f"engine.expert_parallel_size is {size}, and the checkpoint of model.path has {what} "
            f"to divide over so many ranks. {most}"
        )


def divide_experts(num_experts: int, size: int) -> tuple[range, ...]:
    """Return the experts of each rank: neighbours together, the first ranks have one more."""
    least, num_larger = divmod(num_experts, size)
    starts = [rank * least + min(rank, num_larger) for rank in range(size + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))
