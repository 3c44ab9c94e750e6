"""The Mamba2 mixer against transformers' own layer, which sees whole sequences one by one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)

from granite_ray.model.architecture import Architecture
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.mamba import SCAN_LENGTH, MambaMixer
from granite_ray.model.workspace import Workspace

HIDDEN = 32
NUM_SLOTS = 6
# Both sides sum in float32, in another order.
TOLERANCE = 1e-5
# bfloat16 keeps 8 bits; the reference rounds at more places than we do (convolution, time step).
BF16_TOLERANCE = 3e-2


def make_architecture(
    *,
    num_groups: int = 1,
    chunk_size: int = 256,
    has_bias: bool = True,
    time_step_limit: tuple[float, float] = (0.0, float("inf")),
) -> Architecture:
    return Architecture(
        model_type="granitemoehybrid",
        vocab_size=64,
        hidden_size=HIDDEN,
        layer_types=("mamba",),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        embedding_multiplier=1.0,
        attention_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        mlp_size=64,
        num_local_experts=0,
        num_experts_per_tok=0,
        expert_size=0,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_n_groups=num_groups,
        mamba_chunk_size=chunk_size,
        mamba_conv_bias=has_bias,
        mamba_proj_bias=has_bias,
        time_step_limit=time_step_limit,
        dtype="float32",
    )


def make_reference(architecture: Architecture) -> GraniteMoeHybridMambaLayer:
    """Return transformers' layer, filled so that some heads forget at once and some hardly do."""
    config = GraniteMoeHybridConfig(
        hidden_size=architecture.hidden_size,
        num_hidden_layers=1,
        layer_types=["mamba"],
        mamba_expand=architecture.mamba_size // architecture.hidden_size,
        mamba_n_heads=architecture.mamba_n_heads,
        mamba_d_head=architecture.mamba_d_head,
        mamba_d_state=architecture.mamba_d_state,
        mamba_d_conv=architecture.mamba_d_conv,
        mamba_n_groups=architecture.mamba_n_groups,
        mamba_chunk_size=architecture.mamba_chunk_size,
        mamba_conv_bias=architecture.mamba_conv_bias,
        mamba_proj_bias=architecture.mamba_proj_bias,
        time_step_limit=architecture.time_step_limit,
        rms_norm_eps=architecture.rms_norm_eps,
    )
    reference = GraniteMoeHybridMambaLayer(config, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            spread = 2 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0
            parameter.normal_(std=spread, generator=generator)
        reference.dt_bias.uniform_(-5.0, 1.0, generator=generator)
    return reference


@dataclass(frozen=True)
class Layer:
    """Our mixer with its slots, and the reference with the same weights."""

    mixer: MambaMixer
    reference: GraniteMoeHybridMambaLayer
    conv_state: torch.Tensor
    ssm_state: torch.Tensor

    def run(self, segments: Sequence[Segment], *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return each segment's outputs of one forward pass; decodes are those marked so."""
        num_decodes = sum(map(is_decode, segments))
        assert all(map(is_decode, segments[:num_decodes]))
        with torch.inference_mode():
            batch = make_batch(segments, num_decodes)
            y_TD = self.mixer(
                torch.cat(inputs), batch, self.conv_state, self.ssm_state, Workspace()
            )
        return list(y_TD.split([segment.num_tokens for segment in segments]))

    def expect(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return what the reference makes of a whole sequence."""
        with torch.inference_mode():
            expected: torch.Tensor = self.reference(x_TD[None])[0]
        return expected


def is_decode(segment: Segment) -> bool:
    return segment.num_tokens == 1 and segment.num_cached_tokens > 0 and not segment.parents


def make_batch(segments: Sequence[Segment], num_decodes: int) -> ForwardBatch:
    nothing = torch.empty(0, dtype=torch.int64)
    slots_S = torch.tensor([segment.state_slot for segment in segments])
    return ForwardBatch(
        tuple(segments), num_decodes, nothing, nothing, nothing, nothing, slots_S, nothing
    )


def make_layer(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Layer:
    reference = make_reference(architecture).to(dtype)
    mixer = MambaMixer(architecture).to(dtype)
    mixer.load_state_dict(reference.state_dict())
    conv_shape = (NUM_SLOTS, architecture.mamba_conv_dim, architecture.mamba_d_conv - 1)
    heads = (architecture.mamba_n_heads, architecture.mamba_d_head, architecture.mamba_d_state)
    # What a slot holds before its first run must not matter.
    conv_state = torch.full(conv_shape, float("nan"), dtype=dtype)
    return Layer(mixer, reference, conv_state, torch.full((NUM_SLOTS, *heads), float("nan")))


def make_tokens(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare in relation to the largest number of what is expected."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0.1
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < tolerance


def cut(num_tokens: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    borders = sorted({0, num_tokens, *(position % num_tokens for position in cuts)})
    return list(pairwise(borders))


@pytest.fixture(scope="module")
def shared_layer() -> Layer:
    return make_layer(make_architecture())


@pytest.mark.parametrize(
    "num_tokens",
    [*range(1, 9), 63, 64, 65, 66, 127, 128, 129, 200, 255, 256, 257, 400, 511, 512, 513, 600],
)
def test_whole_run_equals_the_reference(shared_layer: Layer, num_tokens: int) -> None:
    x_TD = make_tokens(num_tokens)
    (actual,) = shared_layer.run([Segment(num_tokens, 0, state_slot=2)], x_TD)
    check_close(actual, shared_layer.expect(x_TD))


@pytest.mark.parametrize(
    "architecture",
    [
        make_architecture(num_groups=2),
        make_architecture(num_groups=8, chunk_size=16),
        make_architecture(has_bias=False, chunk_size=100),
        make_architecture(time_step_limit=(0.05, 0.2)),
    ],
    ids=["two groups", "a group for each head", "no biases", "time step limit"],
)
def test_variants_of_the_architecture_equal_the_reference(architecture: Architecture) -> None:
    layer = make_layer(architecture)
    x_TD = make_tokens(150)
    (first,) = layer.run([Segment(149, 0, state_slot=0)], x_TD[:149])
    (second,) = layer.run([Segment(1, 149, state_slot=0)], x_TD[149:])
    check_close(torch.cat([first, second]), layer.expect(x_TD))


@settings(deadline=None, max_examples=40)
@given(
    num_tokens=st.integers(2, 3 * SCAN_LENGTH),
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
    chunk_size=st.sampled_from([7, 32, 256]),
)
def test_partial_prefill_in_any_cuts_equals_the_whole(
    num_tokens: int, cuts: list[int], chunk_size: int
) -> None:
    layer = make_layer(make_architecture(chunk_size=chunk_size))
    x_TD = make_tokens(num_tokens, seed=num_tokens)
    parts = [
        layer.run([Segment(stop - start, start, state_slot=1)], x_TD[start:stop])[0]
        for start, stop in cut(num_tokens, cuts)
    ]
    check_close(torch.cat(parts), layer.expect(x_TD))


def test_decoding_token_by_token_equals_one_prefill(shared_layer: Layer) -> None:
    x_TD = make_tokens(90)
    layer = shared_layer
    parts = layer.run([Segment(70, 0, state_slot=4)], x_TD[:70])
    for position in range(70, 90):
        parts += layer.run([Segment(1, position, state_slot=4)], x_TD[position : position + 1])
    check_close(torch.cat(parts), layer.expect(x_TD))


def test_mixed_batch_equals_its_sequences_alone() -> None:
    layer = make_layer(make_architecture(num_groups=2))
    lens = {0: 80, 3: 5, 5: 131, 1: 64}
    x = {slot: make_tokens(num_tokens, seed=slot) for slot, num_tokens in lens.items()}
    layer.run([Segment(79, 0, 0), Segment(4, 0, 3)], x[0][:79], x[3][:4])
    layer.run([Segment(30, 0, 5)], x[5][:30])
    actual = layer.run(
        [Segment(1, 4, 3), Segment(1, 79, 0), Segment(101, 30, 5), Segment(64, 0, 1)],
        *(x[3][4:], x[0][79:], x[5][30:], x[1]),
    )
    expected = [
        *(layer.expect(x[3])[4:], layer.expect(x[0])[79:]),
        *(layer.expect(x[5])[30:], layer.expect(x[1])),
    ]
    for one, other in zip(actual, expected, strict=True):
        check_close(one, other)


@pytest.mark.parametrize("num_cached", [0, 2, 50])
def test_each_token_of_a_trie_continues_its_ancestors(num_cached: int) -> None:
    layer = make_layer(make_architecture(num_groups=2))
    numbers = random.Random(num_cached)
    parents = tuple(numbers.randrange(max(-1, node - 9), node) for node in range(40))
    prompt, tokens = make_tokens(num_cached), make_tokens(40, seed=1)
    if num_cached:
        layer.run([Segment(num_cached, 0, 3)], prompt)
    before = layer.conv_state.clone(), layer.ssm_state.clone()
    (actual,) = layer.run([Segment(40, num_cached, 3, parents)], tokens)
    for node in range(40):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        check_close(actual[node], layer.expect(torch.cat([prompt, tokens[path]]))[-1])
    assert_same_bits((layer.conv_state, layer.ssm_state), before)


def test_only_the_slots_of_runs_and_decodes_change() -> None:
    layer = make_layer(make_architecture())
    layer.conv_state.normal_()
    layer.ssm_state.normal_()
    before = layer.conv_state.clone(), layer.ssm_state.clone()
    segments = [
        Segment(1, 9, 4),
        Segment(70, 0, 1),
        Segment(6, 9, 2, (-1, 0, -1, 2, 3, 4)),
        Segment(3, 9, 0),
    ]
    layer.run(segments, make_tokens(80))
    for states, old in zip((layer.conv_state, layer.ssm_state), before, strict=True):
        is_changed = [not torch.equal(states[slot], old[slot]) for slot in range(NUM_SLOTS)]
        assert is_changed == [True, True, False, False, True, False]


def test_strong_decay_stays_finite_and_right() -> None:
    layer = make_layer(make_architecture())
    with torch.no_grad():
        for module in (layer.mixer, layer.reference):
            module.A_log.fill_(6.0)
            module.dt_bias.fill_(3.0)
    x_TD = make_tokens(200)
    (actual,) = layer.run([Segment(200, 0, 0)], x_TD)
    check_close(actual, layer.expect(x_TD))


def test_bfloat16_stays_near_the_reference() -> None:
    layer = make_layer(make_architecture(), torch.bfloat16)
    x_TD = make_tokens(140, dtype=torch.bfloat16)
    parts = layer.run([Segment(130, 0, 0)], x_TD[:130])
    for position in range(130, 140):
        parts += layer.run([Segment(1, position, 0)], x_TD[position : position + 1])
    actual = torch.cat(parts)
    assert actual.dtype == torch.bfloat16
    check_close(actual, layer.expect(x_TD), BF16_TOLERANCE)
    exact = make_layer(make_architecture()).expect(x_TD.float())
    ours, theirs = ((y.float() - exact).abs().mean() for y in (actual, layer.expect(x_TD)))
    assert ours < theirs


def assert_same_bits(states: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    for one, other in zip(states, others, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
