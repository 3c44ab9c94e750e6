"""A look at a model before it is trusted: every road to the same logits must give the same.

Elsewhere broken caches and kernels have answered fluently and wrongly for a long time; here the
engine refuses to start.
"""

import logging
from itertools import pairwise
from random import Random

import torch

from granite_ray.engine.runner import Runner
from granite_ray.engine.sequence import ScheduledSequence, Sequence, StepPlan
from granite_ray.errors import InfrastructureError

MAX_TOKENS = 48

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.5}
"""Largest relative distance of logits, as vectors.

Unrelated logits are 1.4 apart. Rounding differs with the shapes of a matrix product and grows over
the layers; in bfloat16 it also changes which experts are chosen, which moves logits in jumps.
"""

logger = logging.getLogger(__name__)


def check_model(
    runner: Runner, block_size: int, max_model_len: int, vocab_size: int, dtype: torch.dtype
) -> None:
    """Compare roads on a fixed prompt, in the first blocks and the first state slot.

    Raises:
        InfrastructureError: Naming the road that disagrees, and by how much.
    """
    num_tokens = min(MAX_TOKENS, max_model_len)
    third, numbers = num_tokens // 3, Random(0)
    token_ids = [numbers.randrange(vocab_size) for _ in range(num_tokens)]
    roads = {
        "in pieces": sorted({0, third, third + 1, num_tokens}),
        "token by token after a prefill": [0, *range(2 * third or 1, num_tokens + 1)],
    }
    expected = _logits_after(runner, token_ids, [0, num_tokens], block_size)
    distances = {
        name: _distance(_logits_after(runner, token_ids, cuts, block_size), expected)
        for name, cuts in roads.items()
    }
    logger.info("canary distances=%s tolerance=%s", distances, TOLERANCES[dtype])
    for name, distance in distances.items():
        if not distance <= TOLERANCES[dtype]:  # also where it is not a number
            raise InfrastructureError(
                f"The engine's check at start failed: logits computed {name} are {distance:.2g} "
                f"from those computed at once, and {TOLERANCES[dtype]} is the limit for "
                f"{str(dtype).removeprefix('torch.')}. This installation computes wrongly; try "
                "model.dtype: float32 or engine.backend: transformers."
            )


def _logits_after(
    runner: Runner, token_ids: list[int], cuts: list[int], block_size: int
) -> torch.Tensor:
    """Return the logits after the last token, computed in the pieces between the cuts."""
    num_blocks = -(-len(token_ids) // block_size)
    sequence = Sequence(0, list(token_ids), len(token_ids), len(token_ids), state_slot=0)
    sequence.block_table = list(range(num_blocks))
    for start, stop in pairwise(cuts):
        sequence.num_computed_tokens = start
        logits = runner.run(StepPlan((ScheduledSequence(sequence, stop - start),)))
    return logits[-1]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
