"""The Mamba2 mixer: projections, causal convolution, state-space recurrence, gated norm.

Takes all segments of a forward batch: decodes in one go, runs in pieces from the state in their
slot, tries from that state without moving it. The recurrence itself is in `mamba_scan`.
"""

# T tokens, L tokens of a piece, S decodes, Z state slots, D hidden size, I inner channels,
# X all that a token is projected to, C convolution channels, K convolution width, W = K - 1,
# H heads, M head size, R state size

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

from granite_ray.model.architecture import Architecture
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.kernels import MambaParameters, kernels_for
from granite_ray.model.layers import Linear
from granite_ray.model.mamba_scan import ScanInputs, scan, scan_trie, step_each, step_together
from granite_ray.model.trie import convolution_windows, visible_nodes
from granite_ray.model.workspace import Workspace

SCAN_LENGTH = 64
"""The most tokens of a piece. Any number gives the same answer; this one keeps it in the cache."""


@dataclass(frozen=True, slots=True)
class Projected:
    """What `in_proj` makes of some tokens."""

    gate_TI: torch.Tensor
    channels_TC: torch.Tensor
    dt_TH: torch.Tensor

    def rows(self, start: int, stop: int) -> "Projected":
        """Return the tokens from `start` up to `stop`."""
        rows = slice(start, stop)
        return Projected(self.gate_TI[rows], self.channels_TC[rows], self.dt_TH[rows])


@dataclass(frozen=True, slots=True)
class SlotState:
    """The state of one sequence in this layer: views of its slot, or copies to be dropped."""

    conv_CW: torch.Tensor
    ssm_HMR: torch.Tensor


class MambaMixer(nn.Module):
    """One Mamba2 mixer, in the place of attention.

    The products with `in_proj` and `out_proj` are in the parameters' dtype, all between them in
    float32.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        num_heads, conv_dim = architecture.mamba_n_heads, architecture.mamba_conv_dim
        inner_size, hidden_size = architecture.mamba_size, architecture.hidden_size
        self.architecture = architecture
        self.scan_length = min(SCAN_LENGTH, architecture.mamba_chunk_size)
        projected_size, has_bias = inner_size + conv_dim + num_heads, architecture.mamba_proj_bias
        self.in_proj = Linear(hidden_size, projected_size, has_bias=has_bias)
        self.conv1d = CausalConv(conv_dim, architecture.mamba_d_conv, architecture.mamba_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.norm = GatedNorm(inner_size, architecture.mamba_n_groups, architecture.rms_norm_eps)
        self.out_proj = Linear(inner_size, hidden_size, has_bias=has_bias)
        multiples = (architecture.mamba_d_head, 4), (architecture.mamba_d_state, 16)
        group_size = inner_size // architecture.mamba_n_groups
        self.kernels = kernels_for(self.dt_bias, *multiples, (group_size, 16), (conv_dim, 16))

    def forward(
        self,
        x_TD: torch.Tensor,
        batch: ForwardBatch,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        workspace: Workspace,
    ) -> torch.Tensor:
        """Return y_TD; the slots of decodes and runs move on in place.

        `conv_state` [Z, C, W], the convolution's last inputs, and `ssm_state` [Z, H, M, R], in
        float32, are this layer's tensors of `ModelState`.
        """
        projected_TX = self.in_proj(x_TD)
        projected = self._split(projected_TX)
        y_TI = torch.empty_like(projected.gate_TI)
        num_decodes = batch.num_decodes
        if num_decodes:
            slots_S = batch.state_slots_S[:num_decodes]
            if self.kernels is None:
                decodes = projected.rows(0, num_decodes)
                y_TI[:num_decodes] = self._decode(decodes, slots_S, conv_state, ssm_state)
            else:
                states = conv_state, ssm_state
                self.kernels.mamba_step(
                    self._told_kernels, projected_TX, slots_S, states, workspace, y_TI[:num_decodes]
                )
        start = num_decodes
        for segment in batch.segments[num_decodes:]:
            stop = start + segment.num_tokens
            state = _start_state(segment, conv_state, ssm_state)
            rows = projected.rows(start, stop)
            if segment.parents:
                y_TI[start:stop] = self._trie(rows, segment.parents, state)
            else:
                self._run(rows, state, y_TI[start:stop])
            start = stop
        y_TD: torch.Tensor = self.out_proj(y_TI)
        return y_TD

    def _split(self, projected_TX: torch.Tensor) -> Projected:
        architecture = self.architecture
        sizes = architecture.mamba_size, architecture.mamba_conv_dim, architecture.mamba_n_heads
        return Projected(*projected_TX.split_with_sizes(sizes, dim=-1))

    @cached_property
    def _told_kernels(self) -> MambaParameters:
        """What the CPU kernel is told of this mixer; weights stay where they are once loaded."""
        architecture, bias = self.architecture, self.conv1d.bias
        min_dt, max_dt = architecture.time_step_limit
        return MambaParameters(
            num_heads=architecture.mamba_n_heads,
            head_dim=architecture.mamba_d_head,
            groups=architecture.mamba_n_groups,
            state_size=architecture.mamba_d_state,
            conv_width=architecture.mamba_d_conv,
            conv_weight=self.conv1d.weight.data_ptr(),
            conv_bias=None if bias is None else bias.data_ptr(),
            dt_bias=self.dt_bias.data_ptr(),
            a_log=self.A_log.data_ptr(),
            d=self.D.data_ptr(),
            norm_weight=self.norm.weight.data_ptr(),
            eps=self.norm.eps,
            min_dt=min_dt,
            max_dt=max_dt,
        )

    def _decode(
        self,
        projected: Projected,
        slots_S: torch.Tensor,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
    ) -> torch.Tensor:
        window_SCK = torch.cat([conv_state[slots_S], projected.channels_TC[..., None]], dim=-1)
        conv_state[slots_S] = window_SCK[..., 1:]
        tokens = self._scan_inputs(self.conv1d.newest(window_SCK), projected.dt_TH)
        step = step_each if ssm_state.is_cpu else step_together
        return self._finish(step(tokens, ssm_state, slots_S), tokens, projected.gate_TI)

    def _run(self, projected: Projected, state: SlotState, out_TI: torch.Tensor) -> None:
        """Take one run in pieces; the state moves on in place."""
        num_tokens = out_TI.shape[0]
        for start in range(0, num_tokens, self.scan_length):
            stop = min(start + self.scan_length, num_tokens)
            piece = projected.rows(start, stop)
            window_XC = torch.cat([state.conv_CW.T, piece.channels_TC])
            state.conv_CW.copy_(window_XC[stop - start :].T)
            tokens = self._scan_inputs(self.conv1d(window_XC), piece.dt_TH)
            y_LHM = scan(tokens, state.ssm_HMR)
            out_TI[start:stop] = self._finish(y_LHM, tokens, piece.gate_TI)

    def _trie(
        self, projected: Projected, parents: tuple[int, ...], state: SlotState
    ) -> torch.Tensor:
        """Take a trie in one piece; the state stays."""
        device = projected.dt_TH.device
        inputs_XC = torch.cat([state.conv_CW.T, projected.channels_TC])
        windows_NK = convolution_windows(parents, self.conv1d.weight.shape[2], device)
        window_NCK = inputs_XC[windows_NK].transpose(1, 2)
        tokens = self._scan_inputs(self.conv1d.newest(window_NCK), projected.dt_TH)
        y_NHM = scan_trie(tokens, visible_nodes(parents, device), state.ssm_HMR)
        return self._finish(y_NHM, tokens, projected.gate_TI)

    def _scan_inputs(self, convolved_LC: torch.Tensor, dt_LH: torch.Tensor) -> ScanInputs:
        architecture = self.architecture
        num_groups, state_size = architecture.mamba_n_groups, architecture.mamba_d_state
        shared_size = num_groups * state_size
        x_LI, B, C = convolved_LC.split_with_sizes(
            (architecture.mamba_size, shared_size, shared_size), dim=-1
        )
        dt_LH = F.softplus(dt_LH.float() + self.dt_bias.float())
        dt_LH = dt_LH.clamp(*architecture.time_step_limit)
        return ScanInputs(
            x_LHM=x_LI.view(-1, architecture.mamba_n_heads, architecture.mamba_d_head),
            B_LGR=B.view(-1, num_groups, state_size),
            C_LGR=C.view(-1, num_groups, state_size),
            dt_LH=dt_LH,
            log_decay_LH=-self.A_log.float().exp() * dt_LH,
        )

    def _finish(
        self, y_LHM: torch.Tensor, tokens: ScanInputs, gate_LI: torch.Tensor
    ) -> torch.Tensor:
        """Add what skips the recurrence; gate and norm."""
        y_LHM.addcmul_(tokens.x_LHM, self.D.float()[:, None])
        normed_LI: torch.Tensor = self.norm(y_LHM.flatten(1), gate_LI)
        return normed_LI


class CausalConv(nn.Module):
    """A convolution of each channel by itself over the last K tokens, then SiLU, in float32."""

    def __init__(self, num_channels: int, width: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, width))
        self.bias = nn.Parameter(torch.empty(num_channels)) if has_bias else None

    def forward(self, window_XC: torch.Tensor) -> torch.Tensor:
        """Return the last L of L + W rows: the first W are context only.

        A sum of shifted rows needs no transposition.
        """
        window_XC = window_XC.float()
        weight_KC = self.weight[:, 0].T.contiguous().float()
        width = len(weight_KC)
        num_tokens = len(window_XC) - width + 1
        y_LC = window_XC[:num_tokens] * weight_KC[0]
        for k in range(1, width):
            y_LC.addcmul_(window_XC[k : k + num_tokens], weight_KC[k])
        return self._activate(y_LC)

    def newest(self, window_SCK: torch.Tensor) -> torch.Tensor:
        """Return the one row that each sequence's window makes, [S, C]."""
        return self._activate((window_SCK * self.weight[:, 0].float()).sum(-1))

    def _activate(self, y_LC: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            y_LC.add_(self.bias)
        return F.silu(y_LC, inplace=True)


class GatedNorm(nn.Module):
    """RMSNorm of each group of channels, after the gate, in float32."""

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, y_LI: torch.Tensor, gate_LI: torch.Tensor) -> torch.Tensor:
        """Return it in the gate's dtype; overwrites `y_LI`."""
        y_LI.mul_(F.silu(gate_LI.float(), inplace=True))
        grouped = y_LI.view(len(y_LI), self.num_groups, -1)
        mean_square = torch.linalg.vecdot(grouped, grouped)[..., None] / grouped.shape[-1]
        grouped.mul_((mean_square + self.eps).rsqrt_())
        return y_LI.mul_(self.weight).to(gate_LI.dtype)


def _start_state(segment: Segment, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> SlotState:
    """Return the state that the segment's tokens continue.

    A fresh run clears its slot, which it is about to fill; a fresh trie may not.
    """
    state = SlotState(conv_state[segment.state_slot], ssm_state[segment.state_slot])
    if segment.num_cached_tokens:
        return state
    if segment.parents:
        return SlotState(torch.zeros_like(state.conv_CW), torch.zeros_like(state.ssm_HMR))
    state.conv_CW.zero_()
    state.ssm_HMR.zero_()
    return state
