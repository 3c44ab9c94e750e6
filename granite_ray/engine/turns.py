"""When sequences that nobody waits for may share a step with interactive ones."""

from granite_ray.engine.sequence import StepPlan

MAX_SLOWDOWN = 2.0
"""Interactive answers take about this many times as long, at most, for what else is computed."""
MAX_DEBT_S = 1.0
"""The longest that others wait for what one odd step has cost."""
FORGETTING = 0.2
"""Weight of the newest in the average duration of interactive steps."""


class Turns:
    """Gives others a place beside interactive sequences as long as that costs these little.

    A step that both share takes longer than interactive sequences need alone: hardly so where the
    weights are read from memory for either, many times so on few cores. What a step takes beyond
    `MAX_SLOWDOWN` times that is a debt, which steps of interactive sequences alone pay back. Ranks
    that step together wait for each other, so there it helps only where all have interactive work.
    """

    def __init__(self) -> None:
        self._alone_s = 0.0  # until it is known, all that a shared step takes is a debt
        self._debt_s = 0.0

    @property
    def are_interactive_only(self) -> bool:
        """Whether the next step is for interactive sequences, if there are any."""
        return self._debt_s > 0

    def note(self, plan: StepPlan, seconds: float) -> None:
        """Take note of how long a step took."""
        num_interactive = sum(item.sequence.is_interactive for item in plan.scheduled)
        if not num_interactive:
            self._debt_s = 0.0  # nobody waits
            return
        if num_interactive == len(plan.scheduled):
            before = self._alone_s or seconds
            self._alone_s = before + FORGETTING * (seconds - before)
        debt_s = self._debt_s + seconds - MAX_SLOWDOWN * self._alone_s
        self._debt_s = min(max(0.0, debt_s), MAX_DEBT_S)
