"""The look at a group before it is trusted: ranks that go astray are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import ModelConfig
from granite_ray.engine.canary import choose_shape
from granite_ray.engine.group_canary import check_group
from granite_ray.engine.loading import Weights
from granite_ray.engine.runner import Runner
from granite_ray.engine.sizing import CacheSize
from granite_ray.errors import InfrastructureError
from granite_ray.model.granite import GraniteModel
from granite_ray.model.state import allocate_state
from granite_ray.parallel.experts import Arrived, GroupDispatcher, Routing
from granite_ray.parallel.groups import Group
from granite_ray.parallel.place import RankPlace
from tests.ranks import CPU, run_ranks
from tests.tiny_models import write_checkpoint

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

SIZE = CacheSize(num_blocks=32, num_slots=8, max_num_seqs=8)


def leave_right(model: GraniteModel, group: Group) -> None:
    """Spoil nothing."""


def mix_up_experts(model: GraniteModel, group: Group) -> None:
    """The follower holds the right experts in the wrong order."""
    if group.rank == 1:
        for layer in model.decoder_layers:
            weight = layer.block_sparse_moe.output_linear.weight
            weight.copy_(weight.roll(1, dims=0))


class Lonely(GroupDispatcher):
    """Each rank asks its own experts alone, as ranks that know nothing of each other."""

    def dispatch(self, x_TD, expert_ids_TK, weights_TK, _):
        local_ids_TK = expert_ids_TK - self.local_experts.start
        num_local = len(self.local_experts)
        is_here = (local_ids_TK >= 0) & (local_ids_TK < num_local)
        routing = Routing(torch.empty(0), (), ())
        ids_TK = local_ids_TK.where(is_here, num_local)
        return Arrived(x_TD, ids_TK, weights_TK, int(is_here.sum())), routing

    def combine(self, out_ND, *_):
        return out_ND


def ask_own_experts_alone(model: GraniteModel, group: Group) -> None:
    for layer in model.decoder_layers:
        dispatcher = Lonely(group, model.architecture.num_local_experts, CPU)
        layer.block_sparse_moe.dispatcher = dispatcher


class Astray(GroupDispatcher):
    """What comes back is given to other tokens."""

    def combine(self, out_ND, routing, buffers):
        return super().combine(out_ND, routing, buffers).flip(0)


def give_answers_to_other_tokens(model: GraniteModel, group: Group) -> None:
    dispatcher = Astray(group, model.architecture.num_local_experts, CPU)
    if group.rank == 1:
        for layer in model.decoder_layers:
            layer.block_sparse_moe.dispatcher = dispatcher


SPOILERS = leave_right, mix_up_experts, ask_own_experts_alone, give_answers_to_other_tokens


def check_each(place: RankPlace, path: str) -> list[str]:
    """For each way to spoil a group, what its check says on this rank."""
    group = Group(place)
    checkpoint = open_checkpoint(ModelConfig(path=path))
    weights = Weights(checkpoint, ModelConfig(dtype="float32"), CPU)
    group.join(CPU)
    return [check_spoiled(group, weights, spoil) for spoil in SPOILERS]


def check_spoiled(
    group: Group, weights: Weights, spoil: Callable[[GraniteModel, Group], None]
) -> str:
    model = weights.load(group)
    state = allocate_state(model.architecture, 32, 16, 8, torch.float32, CPU)
    spoil(model, group)
    shape = choose_shape(SIZE, 16, 2048, model.architecture.vocab_size)
    try:
        check_group(Runner(model, state, 16), group, weights.load_layer, shape)
    except InfrastructureError as error:
        return str(error)
    return ""


def test_ranks_that_do_not_compute_what_one_does_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "granitemoehybrid")
    leader, follower = run_ranks(2, check_each, str(path))
    assert (leader[0], follower[0]) == ("", "")
    for told in (leader[1], follower[1], leader[2], follower[2], follower[3]):
        assert "check at start failed: on rank" in told
        assert "engine.expert_parallel_size: 1" in told
    assert "on rank 1 of 2" in follower[3]
