"""`config.json` as transformers' own config classes understand it, and what we refuse of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from granite_ray.errors import ConfigError
from granite_ray.model.architecture import Architecture, read_architecture
from tests.family import FAMILY, PRESETS

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = SIZES | {"model_type": "granitemoehybrid", "mamba_n_heads": 8, "mamba_d_state": 16}
MAMBA_KEYS = ("n_heads", "d_head", "d_state", "d_conv", "n_groups", "chunk_size")

# Sparse on purpose: what is absent takes a default.
CONFIGS: dict[str, dict[str, Any]] = {
    "granite": SIZES | {"model_type": "granite"},
    "granitemoe": SIZES | {"model_type": "granitemoe"},
    "granitemoeshared": SIZES | {"model_type": "granitemoeshared"},
    "granitemoehybrid": HYBRID,
    "shared expert": SIZES
    | MOE
    | {"model_type": "granitemoeshared", "shared_intermediate_size": 8},
    "dense hybrid": HYBRID | {"num_local_experts": 0, "position_embedding_type": "rope"},
    "layer types": HYBRID | {"layer_types": ["mamba", "attention", "mamba"]},
    "layer types, new names": HYBRID
    | {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "layer types by their other name": HYBRID
    | {"layers_block_type": ["attention", "mamba", "attention"]},
    "attention only": HYBRID | {"layer_types": ["attention"] * 3},
    "positions not encoded": HYBRID | {"position_embedding_type": "nope", "rope_theta": 1e6},
    "key-value heads": SIZES | {"model_type": "granite", "num_key_value_heads": 2},
    "null heads": SIZES | {"model_type": "granite", "num_key_value_heads": None},
    "head size": SIZES | {"model_type": "granite", "head_dim": 24},
    "theta apart": SIZES | {"model_type": "granite", "rope_theta": 5e6, "rope_scaling": None},
    "theta inside": SIZES
    | {"model_type": "granite", "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}},
    "theta in scaling": SIZES
    | {"model_type": "granite", "rope_scaling": {"type": "default", "rope_theta": 2e5}},
    "theta in both places": SIZES
    | {"model_type": "granite", "rope_theta": 5e6, "rope_parameters": {"rope_theta": 3e5}},
    "steps limited": HYBRID | {"time_step_limit": [0.001, 0.1]},
    "steps without limit": HYBRID | {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
    "Mamba heads told": HYBRID | {"mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_conv": 3},
    "Mamba biases": HYBRID | {"mamba_conv_bias": False, "mamba_proj_bias": True},
    "multipliers": SIZES
    | {
        "model_type": "granitemoe",
        "embedding_multiplier": 12,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}


def as_transformers_reads(config: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def assert_same(architecture: Architecture, expected: Any) -> None:
    is_hybrid = expected.model_type == "granitemoehybrid"
    num_layers = expected.num_hidden_layers
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    types = expected.layer_types if is_hybrid else ["full_attention"] * num_layers
    has_experts = getattr(expected, "num_local_experts", 0) > 0
    has_rope = not is_hybrid or expected.position_embedding_type == "rope"
    assert architecture.layer_types == tuple(kinds[name] for name in types)
    assert architecture.head_dim == (
        getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    )
    theta = expected.rope_parameters["rope_theta"]
    assert architecture.rope_theta == (theta if has_rope else None)
    mlp_key = (
        "intermediate_size" if expected.model_type == "granite" else "shared_intermediate_size"
    )
    assert architecture.mlp_size == getattr(expected, mlp_key, 0)
    assert architecture.expert_size == (expected.intermediate_size if has_experts else 0)
    for key in ("num_local_experts", "num_experts_per_tok"):
        assert getattr(architecture, key) == (getattr(expected, key) if has_experts else 0)
    for key in (
        *("model_type", "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    ):
        assert getattr(architecture, key) == getattr(expected, key), key
    if "mamba" in architecture.layer_types:
        for key in MAMBA_KEYS:
            assert getattr(architecture, f"mamba_{key}") == getattr(expected, f"mamba_{key}"), key
        assert architecture.mamba_conv_bias == expected.mamba_conv_bias
        assert architecture.mamba_proj_bias == expected.mamba_proj_bias
        assert architecture.time_step_limit == tuple(expected.time_step_limit)
    else:
        assert all(getattr(architecture, f"mamba_{key}") == 0 for key in MAMBA_KEYS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_means_what_it_means_to_transformers(
    config: dict[str, Any], tmp_path: Path
) -> None:
    expected = as_transformers_reads(config, tmp_path)
    assert_same(read_architecture(config), expected)
    expected.save_pretrained(tmp_path)  # with every key, and the new names
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert read_architecture(rewritten) == read_architecture(config)


@pytest.mark.parametrize("name", FAMILY)
def test_every_preset_means_what_it_means_to_transformers(name: str) -> None:
    config = json.loads((PRESETS / name / "config.json").read_text())
    assert_same(read_architecture(config), AutoConfig.from_pretrained(PRESETS / name))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_has_two_names(key: str) -> None:
    assert read_architecture(CONFIGS["granite"] | {key: "bfloat16"}).dtype == "bfloat16"
    assert read_architecture(CONFIGS["granite"] | {key: None}).dtype == "float32"


def test_no_limit_of_steps_is_an_infinite_one() -> None:
    architecture = read_architecture(HYBRID | {"time_step_limit": None})
    assert architecture.time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"logits_scaling": "six"}, "logits_scaling is 'six'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is .*0.5"),
        ({"rope_parameters": 1e6}, "rope_parameters is 1000000.0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_what_we_do_not_run_is_refused_by_key_and_value(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_architecture(CONFIGS["granite"] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["mamba", "attention", "lstm"]}, "layer_types is .*lstm"),
        ({"layer_types": ["mamba"]}, "layer_types is .* num_hidden_layers is 3"),
        ({"layer_types": "mamba"}, "layer_types is 'mamba'"),
        ({"num_local_experts": 0, "shared_intermediate_size": 0}, "num_local_experts is 0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"mamba_n_heads": 7}, "mamba_n_heads is 7"),
        ({"mamba_n_groups": 3}, "mamba_n_groups is 3"),
        ({"mamba_d_head": "large"}, "mamba_d_head is 'large'"),
        ({"time_step_limit": [0.0]}, "time_step_limit is"),
        ({"time_step_limit": [0.0, {"float": 1}]}, "time_step_limit is"),
    ],
)
def test_what_we_do_not_run_of_hybrids_is_refused_by_key_and_value(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_architecture(HYBRID | changes)


def test_a_mixture_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_local_experts is 0"):
        read_architecture(CONFIGS["granitemoe"] | {"num_local_experts": 0})
