"""Preallocated memory of running sequences: paged keys and values, and Mamba state slots."""

# N blocks, P positions in a block, G key-value heads, A attention head size
# Z state slots, C convolution channels, W convolution width less one, H Mamba heads,
# M Mamba head size, R state size

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from granite_ray.model.architecture import Architecture
from granite_ray.model.pages import ask_for_large_pages


@dataclass(frozen=True, slots=True)
class ModelState:
    """One tensor for each layer of its kind, in the order of the layers.

    Keys are written after rotation. `ssm_states` are float32: rounding would add up in them.
    """

    key_caches: tuple[torch.Tensor, ...]  # [N, P, G, A]
    value_caches: tuple[torch.Tensor, ...]  # [N, P, G, A]
    conv_states: tuple[torch.Tensor, ...]  # [Z, C, W]
    ssm_states: tuple[torch.Tensor, ...]  # [Z, H, M, R]

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy Mamba state from slot to slot: pairs of source and target, targets all different."""
        if not pairs:
            return
        sources, targets = (list(column) for column in zip(*pairs, strict=True))
        for states in (*self.conv_states, *self.ssm_states):
            states[targets] = states[sources]


def allocate_state(
    architecture: Architecture,
    num_blocks: int,
    block_size: int,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ModelState:
    """Return memory for `num_blocks` blocks and `num_slots` state slots; its content is undefined.

    On a CPU the operating system gives pages only as they are first written.
    """
    heads = architecture.num_key_value_heads, architecture.head_dim
    num_attention = architecture.layer_types.count("attention")
    num_mamba = architecture.layer_types.count("mamba")

    def make(shape: tuple[int, ...], kind: torch.dtype, count: int) -> tuple[torch.Tensor, ...]:
        made = tuple(torch.empty(shape, dtype=kind, device=device) for _ in range(count))
        ask_for_large_pages(made)
        return made

    kv_shape = (num_blocks, block_size, *heads)
    conv_shape = (num_slots, architecture.mamba_conv_dim, architecture.mamba_d_conv - 1)
    ssm_shape = (
        num_slots,
        architecture.mamba_n_heads,
        architecture.mamba_d_head,
        architecture.mamba_d_state,
    )
    return ModelState(
        key_caches=make(kv_shape, dtype, num_attention),
        value_caches=make(kv_shape, dtype, num_attention),
        conv_states=make(conv_shape, dtype, num_mamba),
        ssm_states=make(ssm_shape, torch.float32, num_mamba),
    )


def block_bytes(architecture: Architecture, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block over all attention layers."""
    num_attention = architecture.layer_types.count("attention")
    width = architecture.num_key_value_heads * architecture.head_dim
    return 2 * num_attention * block_size * width * dtype.itemsize


def slot_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return the bytes of one state slot over all Mamba layers."""
    num_mamba = architecture.layer_types.count("mamba")
    conv = architecture.mamba_conv_dim * (architecture.mamba_d_conv - 1) * dtype.itemsize
    ssm = (
        architecture.mamba_n_heads
        * architecture.mamba_d_head
        * architecture.mamba_d_state
        * torch.float32.itemsize
    )
    return num_mamba * (conv + ssm)
