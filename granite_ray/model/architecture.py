"""What the checkpoint's `config.json` says of the model, checked and complete.

Fields keep the spelling of `config.json`, where all Granite families share one. A key that is
absent takes the value that transformers would give it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from granite_ray.errors import ConfigError

LayerType = Literal["attention", "mamba"]

# transformers 5 rewrites the names of the layer types; older checkpoints have the first two.
LAYER_TYPES: Mapping[str, LayerType] = {
    "attention": "attention",
    "mamba": "mamba",
    "full_attention": "attention",
    "linear_attention": "mamba",
}
MODEL_TYPES = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One Granite decoder.

    A layer has an attention or a Mamba2 mixer, then feed-forward networks whose outputs are summed:
    routed experts where `num_local_experts` is above 0, and a gated MLP of width `mlp_size` where
    that is above 0 (the only MLP of a dense model, the shared expert of a mixture).

    `rope_theta` is None where positions are not encoded. `mamba_*` are 0 without Mamba layers.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float | None
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    mlp_size: int
    num_local_experts: int
    num_experts_per_tok: int
    expert_size: int
    mamba_n_heads: int
    mamba_d_head: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_n_groups: int
    mamba_chunk_size: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    time_step_limit: tuple[float, float]
    dtype: str

    @property
    def mamba_size(self) -> int:
        """Width of a Mamba layer's inner channels."""
        return self.mamba_n_heads * self.mamba_d_head

    @property
    def mamba_conv_dim(self) -> int:
        """Channels of a Mamba layer's convolution: inner channels, and B and C of each group."""
        return self.mamba_size + 2 * self.mamba_n_groups * self.mamba_d_state


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a checkpoint's `config.json`.

    Raises:
        ConfigError: Naming the key that is missing, wrong or of a kind that we do not run.
    """
    model_type = _choice(config, "model_type", MODEL_TYPES)
    _refuse_variants(config)
    layer_types = _read_layer_types(config, model_type)
    return Architecture(
        model_type=model_type,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=_count(config, "hidden_size"),
        layer_types=layer_types,
        **_read_attention(config, model_type),
        max_position_embeddings=_count(config, "max_position_embeddings"),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        embedding_multiplier=_number(config, "embedding_multiplier", 1.0),
        attention_multiplier=_number(config, "attention_multiplier", 1.0),
        residual_multiplier=_number(config, "residual_multiplier", 1.0),
        logits_scaling=_number(config, "logits_scaling", 1.0),
        **_read_feed_forward(config, model_type),
        **(_read_mamba(config) if "mamba" in layer_types else NO_MAMBA),
        dtype=_read_dtype(config),
    )


def _refuse_variants(config: Mapping[str, Any]) -> None:
    """Refuse what no Granite checkpoint has and the forward pass therefore leaves out."""
    if config.get("hidden_act", "silu") != "silu":
        raise _refusal(config, "hidden_act", "Only silu is run")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise _refusal(config, key, "Only layers without these biases are run")


def _read_layer_types(config: Mapping[str, Any], model_type: str) -> tuple[LayerType, ...]:
    num_layers = _count(config, "num_hidden_layers")
    if model_type != "granitemoehybrid":
        only: LayerType = "attention"
        return (only,) * num_layers
    key = "layer_types" if config.get("layer_types") else "layers_block_type"
    names = config.get(key) or ["mamba"] * num_layers
    if any(name not in LAYER_TYPES for name in names):
        raise _refusal(config, key, f"Each layer must be one of {', '.join(LAYER_TYPES)}")
    if len(names) != num_layers:
        raise _refusal(config, key, f"num_hidden_layers is {num_layers}, and so must be its length")
    return tuple(LAYER_TYPES[name] for name in names)


def _read_attention(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    num_heads = _count(config, "num_attention_heads")
    num_key_value_heads = _count(config, "num_key_value_heads", num_heads)
    if num_heads % num_key_value_heads:
        raise _refusal(
            config, "num_key_value_heads", f"It must divide num_attention_heads, {num_heads}"
        )
    hidden_size = _count(config, "hidden_size")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise _refusal(config, "num_attention_heads", f"It must divide hidden_size, {hidden_size}")
    rope_theta = _read_rope_theta(config, model_type)
    head_dim = _count(config, "head_dim", hidden_size // num_heads)
    if rope_theta is not None and head_dim % 2:
        raise _refusal(
            config, "head_dim", f"Rotation needs an even head size, and it is {head_dim}"
        )
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "rope_theta": rope_theta,
    }


def _read_rope_theta(config: Mapping[str, Any], model_type: str) -> float | None:
    """Return the base of the rotation; a hybrid rotates only where it says "rope"."""
    if model_type == "granitemoehybrid" and config.get("position_embedding_type") != "rope":
        return None
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling stood apart.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise _refusal(config, key, "It must be a mapping")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rope_type != "default" or fraction not in (None, 1.0):
        raise _refusal(config, key, "Only rope_type default on whole heads is run")
    where = rope if "rope_theta" in rope else config
    return _number(where, "rope_theta", 10000.0)


def _read_feed_forward(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    if model_type == "granite":
        mlp_size = _count(config, "intermediate_size")
        return {
            "mlp_size": mlp_size,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "expert_size": 0,
        }
    shared_sizes = {"granitemoe": 0, "granitemoeshared": 0, "granitemoehybrid": 1024}
    mlp_size = 0
    if model_type != "granitemoe":
        default = shared_sizes[model_type]
        mlp_size = _count(config, "shared_intermediate_size", default, at_least=0)
    num_experts = _count(config, "num_local_experts", 8, at_least=0)
    if num_experts == 0 and (model_type != "granitemoehybrid" or mlp_size == 0):
        raise _refusal(config, "num_local_experts", "Layers would be left without feed-forward")
    num_chosen = _count(config, "num_experts_per_tok", 2) if num_experts else 0
    if num_chosen > num_experts:
        raise _refusal(config, "num_experts_per_tok", f"There are {num_experts} experts")
    return {
        "mlp_size": mlp_size,
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_chosen,
        "expert_size": _count(config, "intermediate_size") if num_experts else 0,
    }


NO_MAMBA: Mapping[str, Any] = {
    "mamba_n_heads": 0,
    "mamba_d_head": 0,
    "mamba_d_state": 0,
    "mamba_d_conv": 0,
    "mamba_n_groups": 0,
    "mamba_chunk_size": 0,
    "mamba_conv_bias": False,
    "mamba_proj_bias": False,
    "time_step_limit": (0.0, math.inf),
}


def _read_mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = _count(config, "mamba_n_heads", 128)
    num_groups = _count(config, "mamba_n_groups", 1)
    inner_size = _count(config, "mamba_expand", 2) * _count(config, "hidden_size")
    is_automatic = config.get("mamba_d_head", "auto") == "auto"
    head_size = inner_size // num_heads if is_automatic else _count(config, "mamba_d_head")
    if num_heads * head_size != inner_size:
        raise _refusal(
            config,
            "mamba_n_heads",
            f"Heads of size {head_size} do not make mamba_expand * hidden_size, {inner_size}",
        )
    if num_heads % num_groups:
        raise _refusal(config, "mamba_n_groups", f"It must divide mamba_n_heads, {num_heads}")
    return {
        "mamba_n_heads": num_heads,
        "mamba_d_head": head_size,
        "mamba_d_state": _count(config, "mamba_d_state", 256),
        "mamba_d_conv": _count(config, "mamba_d_conv", 4, at_least=2),
        "mamba_n_groups": num_groups,
        "mamba_chunk_size": _count(config, "mamba_chunk_size", 256),
        "mamba_conv_bias": bool(config.get("mamba_conv_bias", True)),
        "mamba_proj_bias": bool(config.get("mamba_proj_bias", False)),
        "time_step_limit": _read_time_step_limit(config),
    }


def _read_time_step_limit(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the least and the largest step; JSON has no infinity, so transformers spells it."""
    limits = config.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    try:
        least, most = (
            float(limit["__float__"] if isinstance(limit, Mapping) else limit) for limit in limits
        )
    except (TypeError, ValueError, KeyError) as error:
        raise _refusal(config, "time_step_limit", "It must be two numbers") from error
    return least, most


def _read_dtype(config: Mapping[str, Any]) -> str:
    key = "dtype" if config.get("dtype") else "torch_dtype"
    if config.get(key) is None:
        return "float32"
    return _choice(config, key, DTYPES)


# one key ─────────────────────────────────────────────────────────────────────────────────────────


def _choice(config: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = config.get(key)
    if value not in choices:
        raise _refusal(config, key, f"Choose a checkpoint with one of {', '.join(choices)}")
    return str(value)


def _count(
    config: Mapping[str, Any], key: str, default: int | None = None, at_least: int = 1
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise _refusal(config, key, f"It must be a whole number, at least {at_least}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _refusal(config, key, "It must be a positive number")
    return float(value)


def _refusal(config: Mapping[str, Any], key: str, reason: str) -> ConfigError:
    return ConfigError(f"config.json of the checkpoint: {key} is {config.get(key)!r}. {reason}.")
