"""The core of a rank: it steps when any rank of its group has work, for all need its experts."""

import time

from granite_ray.engine.front import Core
from granite_ray.engine.requests import Request
from granite_ray.parallel.groups import Group

IDLE_S = 0.01
"""How long the leader lets an idle group rest before it asks again; the others wait for it."""


class LockstepCore:
    """One rank's core, which makes exactly as many steps as those of all other ranks.

    Before each step all ranks tell whether they have work. One that has none steps empty: its
    experts are asked. An idle group asks on, so that a lost or stopped rank is noticed at once.
    """

    def __init__(self, core: Core, group: Group) -> None:
        self._core = core
        self._group = group

    @property
    def num_steps(self) -> int:
        """Layers run so far."""
        return self._core.num_steps

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens so far that were found in the cache."""
        return self._core.num_cached_tokens

    @property
    def has_work(self) -> bool:
        """Always: others may have."""
        return True

    def add(self, request: Request) -> None:
        """Take in a request for this rank."""
        self._core.add(request)

    def step(self) -> None:
        """Step if any rank has work, else rest.

        Raises:
            RuntimeError: If another rank has gone, or does not come in time.
        """
        if self._group.agree(int(self._core.has_work)):
            self._core.step()
        elif self._group.rank == 0:
            time.sleep(IDLE_S)

    def close(self) -> None:
        """Leave the group; the other ranks cannot go on."""
        self._group.close()
        self._core.close()
