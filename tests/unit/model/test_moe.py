"""Routed experts against a sum over all experts, token by token, and against transformers' own."""

import dataclasses
import json

import pytest
import torch
from transformers import GraniteMoeConfig
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE

from granite_ray.model.architecture import Architecture, read_architecture
from granite_ray.model.moe import MixtureOfExperts, run_grouped, run_one_by_one
from granite_ray.model.workspace import Workspace
from granite_ray.parallel.experts import Arrived, LocalDispatcher
from tests.family import PRESETS

HIDDEN, WIDTH, NUM_EXPERTS, NUM_CHOSEN = 32, 24, 8, 3
NUM_TOKENS = 50


def make_architecture() -> Architecture:
    preset = PRESETS / "granite-3.1-1b-a400m" / "config.json"
    return dataclasses.replace(
        read_architecture(json.loads(preset.read_text())),
        hidden_size=HIDDEN,
        expert_size=WIDTH,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_CHOSEN,
    )


def make_moe(local_experts: range = range(NUM_EXPERTS)) -> MixtureOfExperts:
    moe = MixtureOfExperts(make_architecture(), LocalDispatcher(local_experts))
    moe.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = slice(local_experts.start, local_experts.stop)
    shapes = (NUM_EXPERTS, 2 * WIDTH, HIDDEN), (NUM_EXPERTS, HIDDEN, WIDTH)
    for linear, shape in zip((moe.input_linear, moe.output_linear), shapes, strict=True):
        linear.weight.copy_(torch.randn(shape, generator=generator)[rows] / 4)
    moe.router.layer.weight.copy_(torch.randn(NUM_EXPERTS, HIDDEN, generator=generator) / 2)
    return moe


def make_tokens() -> torch.Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_experts_are_those_of_the_reference() -> None:
    moe, x_TD = make_moe(), make_tokens()
    reference = GraniteMoeMoE(
        GraniteMoeConfig(
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_CHOSEN,
        )
    )
    reference.experts.gate_up_proj.data = moe.input_linear.weight
    reference.experts.down_proj.data = moe.output_linear.weight
    reference.router.weight.data = moe.router.layer.weight
    with torch.inference_mode():
        expected = reference(x_TD[None])[0]
    torch.testing.assert_close(moe(x_TD, Workspace()), expected, rtol=1e-5, atol=1e-5)


def test_experts_are_summed_by_weight() -> None:
    moe, x_TD = make_moe(), make_tokens()
    found = moe(x_TD, Workspace())
    for token, row in zip(x_TD.double(), found, strict=True):
        scores = moe.router.layer.weight.double() @ token
        chosen = scores.argsort(descending=True)[:NUM_CHOSEN]
        weights = scores[chosen].exp() / scores[chosen].exp().sum()
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = (moe.input_linear.weight[expert].double() @ token).chunk(2)
            inner = gate / (1 + (-gate).exp()) * up
            expected += weight * (moe.output_linear.weight[expert].double() @ inner)
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)


class OneRankOfSeveral(LocalDispatcher):
    """Shows its experts all tokens, and leaves out what others would say."""

    def dispatch(self, x_TD, expert_ids_TK, weights_TK, _):
        local_ids_TK = expert_ids_TK - self.local_experts.start
        is_here = (local_ids_TK >= 0) & (local_ids_TK < len(self.local_experts))
        local_ids_TK = local_ids_TK.where(is_here, len(self.local_experts))
        return Arrived(x_TD, local_ids_TK, weights_TK, int(is_here.sum())), None


def make_part(local_experts: range, run_experts: object) -> MixtureOfExperts:
    moe = make_moe(local_experts)
    moe.dispatcher, moe.run_experts = OneRankOfSeveral(local_experts), run_experts
    return moe


@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize("run_experts", [run_one_by_one, run_grouped])
def test_ranks_that_hold_all_experts_between_them_sum_to_the_whole(
    cut: int, run_experts: object
) -> None:
    x_TD, whole = make_tokens(), make_moe()(make_tokens(), Workspace())
    both = range(cut), range(cut, NUM_EXPERTS)
    parts = [make_part(local_experts, run_experts)(x_TD, Workspace()) for local_experts in both]
    assert all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_grouped_products_are_the_same_as_one_by_one() -> None:
    x_TD, moe = make_tokens(), make_moe()
    expected = moe(x_TD, Workspace())
    moe.run_experts = run_grouped
    torch.testing.assert_close(moe(x_TD, Workspace()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run_experts", [run_one_by_one, run_grouped])
def test_a_rank_whose_experts_nobody_chose_adds_nothing(run_experts: object) -> None:
    moe = make_part(range(4, NUM_EXPERTS), run_experts)
    x_TD = make_tokens().abs()
    moe.router.layer.weight[:4] = 1.0
    moe.router.layer.weight[4:] = -1.0
    workspace = Workspace()
    workspace.take("expert_out", (1, HIDDEN), x_TD).fill_(torch.nan)
    assert moe(x_TD, workspace).eq(0).all()


@pytest.mark.parametrize("run_experts", [run_one_by_one, run_grouped])
@pytest.mark.parametrize("local_experts", [range(NUM_EXPERTS), range(3, 3)])
def test_no_tokens_give_no_rows(local_experts: range, run_experts: object) -> None:
    moe = make_part(local_experts, run_experts)
    assert moe(make_tokens()[:0], Workspace()).shape == (0, HIDDEN)


def test_a_single_token_runs_its_experts_only() -> None:
    moe, x_TD = make_moe(), make_tokens()
    expected = moe(x_TD, Workspace())[:1]
    expert_ids, _ = moe.router(x_TD[:1])
    idle = [expert for expert in range(NUM_EXPERTS) if expert not in expert_ids[0]]
    moe.input_linear.weight[idle] = torch.nan
    torch.testing.assert_close(moe(x_TD[:1], Workspace()), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_experts_stay_near_float32() -> None:
    """Inputs, weights and three intermediate results are rounded to 8 bits each."""
    x_TD, exact = make_tokens(), make_moe()
    expert_ids, _ = exact.router(x_TD)
    rounded = make_moe().bfloat16()
    # The same choice on both sides: here only the experts are compared.
    is_same = (rounded.router(x_TD.bfloat16())[0].sort().values == expert_ids.sort().values).all(1)
    assert is_same.float().mean() > 0.8
    found = rounded(x_TD.bfloat16(), Workspace())[is_same].float()
    expected = exact(x_TD, Workspace())[is_same]
    assert (found - expected).norm() / expected.norm() < 0.01
