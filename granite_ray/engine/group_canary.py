"""A look at a group before it is trusted: its ranks together must say what one says alone.

Elsewhere ranks that each ran their own batches beside shared experts have answered fluently, and
nearly always wrongly. Here the group refuses to start.
"""

import logging

import torch

from granite_ray.engine.canary import (
    NUM_PROMPTS,
    TOLERANCES,
    PromptShape,
    logits_after,
    make_prompts,
    middle_distance,
)
from granite_ray.engine.runner import Runner
from granite_ray.errors import InfrastructureError
from granite_ray.model.alone import ReadLayer, computing_alone
from granite_ray.parallel.groups import Group

logger = logging.getLogger(__name__)


def check_group(runner: Runner, group: Group, read_layer: ReadLayer, shape: PromptShape) -> None:
    """Compare what the ranks compute together with what the leader computes from all weights.

    Each rank begins with another one of the prompts, so that answers that go astray show.

    Raises:
        InfrastructureError: Naming how far they are apart.
    """
    cuts = [0, shape.num_tokens]
    indices = [(index + group.rank) % NUM_PROMPTS for index in range(shape.num_prompts)]
    found = logits_after(runner, make_prompts(shape, indices), cuts)
    expected = found.new_empty((NUM_PROMPTS, found.shape[1]))
    if group.rank == 0:
        expected.copy_(_compute_alone(runner, read_layer, shape))
    group.meet("computed alone")
    group.tell(expected)
    distance = middle_distance(found, expected[indices])
    tolerance = TOLERANCES[runner.dtype]
    logger.info("canary of %d ranks distance=%.2g tolerance=%s", group.size, distance, tolerance)
    if not distance <= tolerance:  # also where it is not a number
        raise InfrastructureError(
            f"The engine's check at start failed: on rank {group.rank} of {group.size}, logits "
            f"computed together are {distance:.2g} from those that one rank computes alone, and "
            f"{tolerance} is the limit for {str(runner.dtype).removeprefix('torch.')}. This "
            "installation exchanges tokens wrongly; try engine.expert_parallel_size: 1."
        )


def _compute_alone(runner: Runner, read_layer: ReadLayer, shape: PromptShape) -> torch.Tensor:
    """Return the logits after each of all prompts, [NUM_PROMPTS, vocabulary]."""
    rows = []
    with computing_alone(runner.model, read_layer):
        for first in range(0, NUM_PROMPTS, shape.num_prompts):
            indices = list(range(first, min(first + shape.num_prompts, NUM_PROMPTS)))
            rows.append(logits_after(runner, make_prompts(shape, indices), [0, shape.num_tokens]))
    return torch.cat(rows)
