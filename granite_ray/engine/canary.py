"""A look at a model before it is trusted: every road to the same logits must give the same.

Elsewhere broken caches and kernels have answered fluently and wrongly for a long time; here the
engine refuses to start.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch

from granite_ray.engine.runner import Runner
from granite_ray.engine.sequence import ScheduledSequence, Sequence, StepPlan
from granite_ray.engine.sizing import CacheSize
from granite_ray.errors import InfrastructureError

MAX_TOKENS = 48
NUM_PROMPTS = 5
"""Of their distances the middle one counts: where two experts are all but equally good, rounding
decides, and may move one prompt's logits far. A broken road moves those of all."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Largest relative distance of logits, as vectors.

Unrelated logits are 1.4 apart. Rounding differs with the shapes of a matrix product and grows over
the layers: small random models of the whole family came to 0.015 in float16, 0.12 in bfloat16.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptShape:
    """How many fixed prompts run side by side, how long they are, and in which blocks."""

    num_prompts: int
    num_tokens: int
    block_size: int
    vocab_size: int


def choose_shape(
    size: CacheSize, block_size: int, max_model_len: int, vocab_size: int
) -> PromptShape:
    """Choose what fits into a cache."""
    num_tokens = min(MAX_TOKENS, max_model_len)
    num_blocks = -(-num_tokens // block_size)
    num_prompts = min(NUM_PROMPTS, size.max_num_seqs, size.num_blocks // num_blocks)
    return PromptShape(num_prompts, num_tokens, block_size, vocab_size)


def check_model(runner: Runner, shape: PromptShape) -> None:
    """Compare roads on a few fixed prompts, in the first blocks and the first state slots.

    Raises:
        InfrastructureError: Naming the road that disagrees, and by how much.
    """
    prompts = make_prompts(shape, range(shape.num_prompts))
    num_tokens, third = shape.num_tokens, shape.num_tokens // 3
    roads = {
        "in pieces": sorted({0, third, third + 1, num_tokens}),
        "token by token after a prefill": [0, *range(2 * third or 1, num_tokens + 1)],
    }
    expected = logits_after(runner, prompts, [0, num_tokens])
    distances = {
        name: middle_distance(logits_after(runner, prompts, cuts), expected)
        for name, cuts in roads.items()
    }
    tolerance = TOLERANCES[runner.dtype]
    logger.info("canary distances=%s tolerance=%s", distances, tolerance)
    for name, distance in distances.items():
        if not distance <= tolerance:  # also where it is not a number
            raise InfrastructureError(
                f"The engine's check at start failed: logits computed {name} are {distance:.2g} "
                f"from those computed at once, and {tolerance} is the limit for "
                f"{str(runner.dtype).removeprefix('torch.')}. This installation computes wrongly; "
                "try model.dtype: float32 or engine.backend: transformers."
            )


def make_prompts(shape: PromptShape, indices: Iterable[int]) -> list[Sequence]:
    """Return some of the fixed prompts, one after the other in the cache."""
    num_tokens, prompts = shape.num_tokens, []
    num_blocks = -(-num_tokens // shape.block_size)
    for place, index in enumerate(indices):
        numbers = Random(index)
        token_ids = [numbers.randrange(shape.vocab_size) for _ in range(num_tokens)]
        sequence = Sequence(place, token_ids, num_tokens, num_tokens, state_slot=place)
        sequence.block_table = list(range(place * num_blocks, (place + 1) * num_blocks))
        prompts.append(sequence)
    return prompts


def logits_after(runner: Runner, prompts: list[Sequence], cuts: list[int]) -> torch.Tensor:
    """Return the logits after each prompt's last token, computed in the pieces between the cuts."""
    for start, stop in pairwise(cuts):
        for sequence in prompts:
            sequence.num_computed_tokens = start
        pieces = tuple(ScheduledSequence(sequence, stop - start) for sequence in prompts)
        logits = runner.run(StepPlan(pieces))
    return logits


def middle_distance(found_SV: torch.Tensor, expected_SV: torch.Tensor) -> float:
    """Return the middle one of the prompts' distances; no number where one is none."""
    distances_S = (found_SV - expected_SV).norm(dim=-1) / expected_SV.norm(dim=-1)
    return float(distances_S.median())
