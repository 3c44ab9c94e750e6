"""The compiled functions, called with tensors."""

# T tokens, D hidden size, O output size, S sequences, H heads, G key-value heads, A head size,
# F half of it, N blocks or tokens, P positions in a block, B blocks of a sequence, E experts,
# K experts per token or keys, I inner width, Z state slots, C channels, W convolution width less 1,
# M Mamba head size, R state size, X all that a Mamba token is projected to

import ctypes
from dataclasses import dataclass

import torch

from granite_ray.model.workspace import Workspace

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_NUMBER, _THREADS = ctypes.c_float, ctypes.c_int
MAX_SCORES = 2**24
"""Scores of all threads, 64 MiB: with more, a long context's heads are taken in parts."""
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "linear": (*[_POINTER] * 3, *[_INTEGER] * 3, _THREADS),
    "norm": (*[_POINTER] * 3, *[_INTEGER] * 2, _NUMBER, _THREADS),
    "rotate": (_POINTER, _INTEGER, *[_POINTER] * 2, *[_INTEGER] * 3, _THREADS),
    "gate": (*[_POINTER] * 2, *[_INTEGER] * 2, _THREADS),
    "route": (_POINTER, *[_INTEGER] * 3, *[_POINTER] * 2),
    "experts": (*[_POINTER] * 3, *[_INTEGER] * 3, *[_POINTER] * 4, *[_INTEGER] * 2, _THREADS),
    "mamba_step": (
        *(_POINTER, _POINTER, _INTEGER, _POINTER, _INTEGER),
        *([_POINTER] * 4),
        _THREADS,
    ),
    "attend": (
        *(_POINTER, _INTEGER, _POINTER, _POINTER, _POINTER, _INTEGER, _POINTER),
        *([_INTEGER] * 5),
        *(_NUMBER, _INTEGER, _POINTER, _INTEGER, _POINTER, _THREADS),
    ),
}


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """One layer's cache, [N, P, G, A] each, and which of it each sequence sees.

    Attributes:
        keys: Of all sequences.
        values: Of all sequences.
        block_tables_SB: int32.
        num_keys_S: int64, positions that a sequence sees, its own included.
        max_num_keys: Not less than any of them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_tables_SB: torch.Tensor
    num_keys_S: torch.Tensor
    max_num_keys: int


class MambaParameters(ctypes.Structure):
    """A mixer's sizes, its parameters by address, and numbers; `Mamba` in mamba.c."""

    _fields_ = (
        *((name, _INTEGER) for name in ("num_heads", "head_dim", "groups")),
        *((name, _INTEGER) for name in ("state_size", "conv_width")),
        *((name, _POINTER) for name in ("conv_weight", "conv_bias", "dt_bias")),
        *((name, _POINTER) for name in ("a_log", "d", "norm_weight")),
        *((name, _NUMBER) for name in ("eps", "min_dt", "max_dt")),
    )


class CpuKernels:
    """The compiled functions, on tensors.

    All tensors are bfloat16, contiguous, and on the CPU, where nothing else is said.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def linear(self, x_TD: torch.Tensor, weight_OD: torch.Tensor, out_TO: torch.Tensor) -> None:
        """Write x · weightᵀ."""
        num_tokens, size = x_TD.shape
        self._library.linear(
            x_TD.data_ptr(),
            weight_OD.data_ptr(),
            out_TO.data_ptr(),
            num_tokens,
            size,
            len(weight_OD),
            torch.get_num_threads(),
        )

    def norm(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_TD: torch.Tensor
    ) -> None:
        """Write each token at unit mean square, times the weight."""
        self._library.norm(
            x_TD.data_ptr(),
            weight_D.data_ptr(),
            out_TD.data_ptr(),
            *x_TD.shape,
            eps,
            torch.get_num_threads(),
        )

    def gate(self, gate_up: torch.Tensor, inner_TI: torch.Tensor) -> None:
        """Write silu(gate) · up; `gate_up` is [T, 2I], gate half first."""
        self._library.gate(
            gate_up.data_ptr(), inner_TI.data_ptr(), *inner_TI.shape, torch.get_num_threads()
        )

    def rotate(self, heads_THA: torch.Tensor, cos_T1F: torch.Tensor, sin_T1F: torch.Tensor) -> None:
        """Rotate heads in place; a token's stand together, tokens may lie apart."""
        self._library.rotate(
            heads_THA.data_ptr(),
            heads_THA.stride(0),
            cos_T1F.data_ptr(),
            sin_T1F.data_ptr(),
            *heads_THA.shape,
            torch.get_num_threads(),
        )

    def route(self, scores_TE: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids of the largest scores, int64, and their softmax; [T, K] each."""
        expert_ids_TK = torch.empty(len(scores_TE), num_chosen, dtype=torch.int64)
        weights_TK = scores_TE.new_empty(expert_ids_TK.shape)
        self._library.route(
            scores_TE.data_ptr(),
            *scores_TE.shape,
            num_chosen,
            expert_ids_TK.data_ptr(),
            weights_TK.data_ptr(),
        )
        return expert_ids_TK, weights_TK

    def attend(
        self,
        queries_SHA: torch.Tensor,
        cache: PagedKeys,
        scale: float,
        workspace: Workspace,
        out_SHA: torch.Tensor,
    ) -> None:
        """Write what one query of each sequence takes from what is cached.

        Args:
            queries_SHA: Each sequence's heads stand together; sequences may lie apart.
            cache: What they see.
            scale: Of the scores.
            workspace: Memory.
            out_SHA: The answers.
        """
        keys, values = cache.keys, cache.values
        _, block_size, num_kv_heads, head_dim = keys.shape
        num_sequences, num_heads, _ = queries_SHA.shape
        num_threads, group = torch.get_num_threads(), num_heads // num_kv_heads
        # A thread has for each head the scores of all keys, and the sum of values.
        room = -(-cache.max_num_keys // 16) * 16 + head_dim
        parts = 1 if num_sequences >= 2 * num_threads else min(num_threads, num_kv_heads)
        while parts < num_kv_heads and num_threads * num_heads * room > parts * MAX_SCORES:
            parts = min(2 * parts, num_kv_heads)
        shape = num_threads, -(-num_kv_heads // parts) * group, room
        scores = workspace.take("scores", shape, keys, torch.float32)
        self._library.attend(
            queries_SHA.data_ptr(),
            queries_SHA.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            cache.block_tables_SB.data_ptr(),
            cache.block_tables_SB.stride(0),
            cache.num_keys_S.data_ptr(),
            num_sequences,
            num_kv_heads,
            group,
            head_dim,
            block_size,
            scale,
            parts,
            scores.data_ptr(),
            room,
            out_SHA.data_ptr(),
            len(scores),
        )

    def mamba_step(
        self,
        parameters: MambaParameters,
        projected_SX: torch.Tensor,
        slots_S: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor],
        workspace: Workspace,
        out_SI: torch.Tensor,
    ) -> None:
        """Move each sequence's state by one token, and write what that reads.

        Args:
            parameters: Of the mixer.
            projected_SX: Gate, channels and time step of each token; rows may lie apart.
            slots_S: int64, where each sequence's state is.
            states: Of the convolution, [Z, C, W], and the recurrence, float32, [Z, H, M, R]; they
                move on in place.
            workspace: Memory.
            out_SI: Gated and normed.
        """
        conv_state, ssm_state = states
        num_sequences, inner_size = out_SI.shape
        shape = num_sequences, conv_state.shape[1] + inner_size
        room = workspace.take("mamba", shape, out_SI, torch.float32)
        self._library.mamba_step(
            ctypes.byref(parameters),
            projected_SX.data_ptr(),
            projected_SX.stride(0),
            slots_S.data_ptr(),
            num_sequences,
            conv_state.data_ptr(),
            ssm_state.data_ptr(),
            room.data_ptr(),
            out_SI.data_ptr(),
            torch.get_num_threads(),
        )

    def experts(
        self,
        x_ND: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        expert_weights: tuple[torch.Tensor, torch.Tensor],
        workspace: Workspace,
    ) -> torch.Tensor:
        """Return the sum, by weight, of what each token's experts say, [N, D].

        Args:
            x_ND: Tokens.
            expert_ids_NK: int64; the number of experts stands for none.
            weights_NK: Of each token's experts.
            expert_weights: [E, 2I, D] and [E, D, I].
            workspace: Memory; what is returned is part of it.
        """
        input_weight, output_weight = expert_weights
        num_experts, size, width = output_weight.shape
        num_tokens, num_chosen = expert_ids_NK.shape
        room = (num_tokens * num_chosen * (2 * size + 3 * width),)
        out_ND = workspace.take("mixed", (num_tokens, size), x_ND)
        self._library.experts(
            x_ND.data_ptr(),
            expert_ids_NK.data_ptr(),
            weights_NK.data_ptr(),
            num_tokens,
            num_chosen,
            num_experts,
            input_weight.data_ptr(),
            output_weight.data_ptr(),
            workspace.take("experts", room, x_ND).data_ptr(),
            out_ND.data_ptr(),
            size,
            width,
            torch.get_num_threads(),
        )
        return out_ND
