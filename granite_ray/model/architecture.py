"""What the checkpoint's `config.json` says of the model, checked and complete.

Fields keep the spelling of `config.json`, where all Granite families share one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LayerType = Literal["attention", "mamba"]


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
    raise NotImplementedError
