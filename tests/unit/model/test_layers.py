"""Norm, rotation and MLP against transformers' own, to the last bit where both round alike."""

import pytest
import torch
from transformers import GraniteConfig
from transformers.models.granite.modeling_granite import (
    GraniteMLP,
    GraniteRMSNorm,
    GraniteRotaryEmbedding,
    apply_rotary_pos_emb,
)

from granite_ray.model.layers import GatedMLP, RMSNorm, rotate, rotation_tables
from granite_ray.model.workspace import Workspace

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
def test_a_norm_rounds_before_its_weight(dtype: torch.dtype) -> None:
    x_TD, weight = 30 * draw(40, 64, dtype=dtype), draw(64, dtype=dtype)
    ours, theirs = RMSNorm(64, 1e-5), GraniteRMSNorm(64, 1e-5)
    ours.weight.data, theirs.weight.data = weight, weight
    found, expected = ours(x_TD, Workspace()), theirs(x_TD)
    assert found.dtype == dtype
    # Sums in another order may change a rounding: one unit in the last place, rarely.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    assert found.eq(expected).float().mean() > 0.5


@DTYPES
def test_heads_are_rotated_by_their_positions(dtype: torch.dtype) -> None:
    config = GraniteConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_theta": 5e6}
    )
    positions = torch.tensor([0, 1, 7, 131_071, 3])
    heads_THA = draw(5, 4, 16, dtype=dtype)
    cos, sin = GraniteRotaryEmbedding(config)(heads_THA[None], positions[None])
    both = apply_rotary_pos_emb(heads_THA[None], heads_THA[None], cos, sin, unsqueeze_dim=2)
    found = heads_THA.clone()
    rotate(found, *rotation_tables(positions, 5e6, 16, dtype))
    # Theirs rounds both products, ours one.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, both[0][0], rtol=0, atol=2 * eps * heads_THA.abs().max())
    assert not found[1].equal(heads_THA[1])


@DTYPES
def test_the_gate_half_comes_first(dtype: torch.dtype) -> None:
    ours = GatedMLP(64, 96)
    theirs = GraniteMLP(GraniteConfig(hidden_size=64, intermediate_size=96)).to(dtype)
    gate, up = (draw(96, 64, dtype=dtype, seed=seed) / 8 for seed in (1, 2))
    down = draw(64, 96, dtype=dtype, seed=3) / 8
    ours.input_linear.weight.data = torch.cat([gate, up])
    ours.output_linear.weight.data = down
    theirs.gate_proj.weight.data, theirs.up_proj.weight.data = gate, up
    theirs.down_proj.weight.data = down
    x_TD = draw(20, 64, dtype=dtype)
    with torch.inference_mode():
        found, expected = ours(x_TD, Workspace()), theirs(x_TD)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=4 * eps * expected.abs().max())
