"""Safetensors → parameters: everything at its place, and nothing that does not fit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from granite_ray.errors import ConfigError
from granite_ray.model.architecture import read_architecture
from granite_ray.model.weights import (
    count_parameters,
    dummy_layer,
    dummy_model,
    load_layer,
    load_weights,
)
from granite_ray.parallel.experts import LocalDispatcher
from tests.family import FAMILY, PRESETS
from tests.forward_batches import Stepper, Turn
from tests.unit.model.conftest import CPU, Member, make_member

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Member:
    """Of all kinds of layers one at least, with experts and a shared one."""
    return make_member(tmp_path_factory.mktemp("weights") / "hybrid", "granite-4.0-h-tiny")


@pytest.fixture
def rewrite(hybrid: Member, tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Member]:
    """Return a copy of the checkpoint whose tensors were changed."""

    def make(change: Callable[[Tensors], None]) -> Member:
        tensors = load_file(hybrid.path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return dataclasses.replace(hybrid, path=tmp_path)

    return make


def logits_of(member: Member) -> torch.Tensor:
    [logits] = Stepper(member.load()).run(Turn(0, [3, 1, 4, 1, 5, 9]))
    return logits


def test_projections_are_stacked_in_the_order_of_their_names(member: Member) -> None:
    found = dict(member.load().named_parameters())
    theirs = load_file(member.path / "model.safetensors")
    for layer, layer_type in enumerate(member.architecture.layer_types):
        if layer_type == "attention":
            projections = [theirs[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
            assert found[f"layers.{layer}.self_attn.qkv_proj.weight"].equal(torch.cat(projections))
    if member.architecture.model_type == "granite":
        halves = [theirs[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert found["layers.0.shared_mlp.input_linear.weight"].equal(torch.cat(halves))
    assert sum(map(torch.numel, found.values())) == sum(map(torch.numel, theirs.values()))


def test_a_checkpoint_in_many_files_is_the_same(hybrid: Member, tmp_path: Path) -> None:
    hybrid.reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    many = dataclasses.replace(hybrid, path=tmp_path)
    assert logits_of(many).equal(logits_of(hybrid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_take_the_dtype_that_is_asked_for(hybrid: Member, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    found = dict(hybrid.load(dtype).named_parameters())
    assert {parameter.dtype for parameter in found.values()} == {dtype}
    theirs = load_file(hybrid.path / "model.safetensors")["model.norm.weight"]
    assert found["norm.weight"].equal(theirs.to(dtype))
    assert torch.get_default_dtype() == before


def test_a_rank_reads_its_experts_only(hybrid: Member) -> None:
    local_experts = range(5, 17)
    model = load_weights(
        str(hybrid.path),
        hybrid.architecture,
        dtype=torch.float32,
        device=CPU,
        dispatcher=LocalDispatcher(local_experts),
    )
    theirs = load_file(hybrid.path / "model.safetensors")
    for name, parameter in model.named_parameters():
        expected = theirs.get(f"model.{name}")
        if name.endswith(("moe.input_linear.weight", "moe.output_linear.weight")):
            assert parameter.equal(expected[5:17])
        elif expected is not None:
            assert parameter.equal(expected)


def test_an_embedding_that_is_written_twice_is_read_once(
    hybrid: Member, rewrite: Callable[..., Member]
) -> None:
    copied = rewrite(
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        )
    )
    assert logits_of(copied).equal(logits_of(hybrid))


def test_all_that_does_not_fit_is_told_in_one_error(rewrite: Callable[..., Member]) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("layernorm.weight")]:
            del tensors[name]
        tensors["model.layers.0.mamba.extra"] = torch.ones(2)
        tensors["model.layers.2.self_attn.k_proj.weight"] = torch.ones(3, 5)

    with pytest.raises(ConfigError) as told:
        rewrite(change).load()
    message = str(told.value)
    assert "8 tensors are missing: model.layers.0.input_layernorm.weight, " in message
    assert "1 tensors are unknown: model.layers.0.mamba.extra" in message
    assert (
        "1 tensors are of another shape: model.layers.2.self_attn.k_proj.weight [3, 5]" in message
    )
    assert message.count("layernorm") == 3, "the first few are enough"


def test_projections_whose_sizes_only_sum_up_are_refused(rewrite: Callable[..., Member]) -> None:
    def change(tensors: Tensors) -> None:
        names = [f"model.layers.2.self_attn.{x}_proj.weight" for x in "qk"]
        both = torch.cat([tensors[name] for name in names])
        tensors[names[0]], tensors[names[1]] = both[:8].clone(), both[8:].clone()

    with pytest.raises(ConfigError, match="2 tensors are of another shape"):
        rewrite(change).load()


@pytest.mark.parametrize("content", [None, b"not a safetensors file, but long enough to be read"])
def test_weights_that_cannot_be_read_are_refused(
    hybrid: Member, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="the weights cannot be read"):
        dataclasses.replace(hybrid, path=tmp_path).load()


def test_an_index_without_a_map_is_refused(hybrid: Member, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="the weights cannot be read"):
        dataclasses.replace(hybrid, path=tmp_path).load()


def test_parameters_are_counted_without_being_made(member: Member) -> None:
    assert count_parameters(member.architecture) == member.reference.num_parameters()


@pytest.mark.parametrize("name", FAMILY)
def test_real_shapes_have_as_many_parameters_as_their_names_say(name: str) -> None:
    # In billions, from transformers' own classes on the meta device.
    billions = {
        "granite-3.1-1b-a400m": 1.33,
        "granite-3.1-2b": 2.53,
        "granite-3.1-3b-a800m": 3.30,
        "granite-3.1-8b": 8.17,
        "granite-4.0-1b": 1.63,
        "granite-4.0-350m": 0.35,
        "granite-4.0-h-1b": 1.46,
        "granite-4.0-h-350m": 0.34,
        "granite-4.0-h-micro": 3.19,
        "granite-4.0-h-small": 32.2,
        "granite-4.0-h-tiny": 6.94,
        "granite-4.0-micro": 3.40,
    }
    config = json.loads((PRESETS / name / "config.json").read_text())
    assert count_parameters(read_architecture(config)) / 1e9 == pytest.approx(
        billions[name], abs=0.01 if billions[name] < 10 else 0.05
    )


def test_noise_makes_text_that_varies(member: Member) -> None:
    stepper = Stepper(dummy_model(member.architecture, torch.float32, CPU, seed=0))
    token_ids = [1, 2, 3]
    for _ in range(30):
        [logits] = stepper.run(Turn(0, token_ids[-1:] if len(token_ids) > 3 else token_ids))
        token_ids.append(int(logits[-1].argmax()))
    assert len(set(token_ids[3:])) > 10
    assert logits.isfinite().all()


def test_noise_has_its_scale_and_repeats_no_row(hybrid: Member) -> None:
    wide = dataclasses.replace(hybrid.architecture, vocab_size=60_000)  # more than one repetition
    model = dummy_model(wide, torch.float32, CPU, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = 2 / parameter.shape[-1] ** 0.5
        if name == "embed_tokens.weight":
            std = 0.5 / wide.embedding_multiplier
        assert parameter.std() == pytest.approx(std, rel=0.1), name
        assert parameter.mean().abs() < 0.2 * std
        rows = parameter.flatten(0, -2)
        assert len(rows.unique(dim=0)) == len(rows), name


def test_noise_is_that_of_its_seed(hybrid: Member) -> None:
    models = [dummy_model(hybrid.architecture, torch.bfloat16, CPU, seed) for seed in (1, 1, 2)]
    one, same, other = ([*model.parameters()] for model in models)
    assert all(a.equal(b) for a, b in zip(one, same, strict=True))
    assert not any(a.equal(b) for a, b in zip(one, other, strict=True) if a.ndim > 1)


def test_made_up_experts_are_the_same_on_every_rank(hybrid: Member) -> None:
    how = hybrid.architecture, torch.float32, CPU, 3
    whole = dict(dummy_model(*how).named_parameters())
    part = dict(dummy_model(*how, LocalDispatcher(range(5, 17))).named_parameters())
    for name, parameter in part.items():
        is_divided = name.endswith(("moe.input_linear.weight", "moe.output_linear.weight"))
        assert parameter.equal(whole[name][5:17] if is_divided else whole[name])


def test_the_experts_of_one_layer_are_those_of_the_model(hybrid: Member) -> None:
    how = hybrid.architecture, torch.float32, CPU
    read = load_layer(str(hybrid.path), *how, 2)
    made = dummy_layer(*how, 3, 2)
    for layer, model in ((read, hybrid.load()), (made, dummy_model(*how, 3))):
        expected = dict(model.layers[2].block_sparse_moe.named_parameters())
        found = dict(layer.named_parameters())
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)


def test_a_rank_has_as_many_parameters_as_are_counted_for_it(hybrid: Member) -> None:
    local_experts = range(5, 17)
    how = hybrid.architecture, torch.float32, CPU, 3
    model = dummy_model(*how, LocalDispatcher(local_experts))
    found = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(hybrid.architecture, local_experts) == found


def test_mamba_starts_from_what_training_starts_from(hybrid: Member) -> None:
    found = dict(dummy_model(hybrid.architecture, torch.float32, CPU, seed=0).named_parameters())
    num_heads = hybrid.architecture.mamba_n_heads
    assert found["layers.0.mamba.A_log"].exp().round().tolist() == [*range(1, num_heads + 1)]
    for name in ("D", "dt_bias", "norm.weight"):
        assert found[f"layers.0.mamba.{name}"].eq(1).all()
    assert found["layers.0.mamba.conv1d.bias"].eq(0).all()
