"""The recurrence of a Mamba2 layer in float32: states move along tokens, outputs are read of them.

Tokens are taken in pieces: within a piece each reads the earlier ones through a quadratic form,
like attention without softmax; from piece to piece only the state is carried. Knows nothing of
slots, projections and batches.
"""

# L tokens of a piece, S sequences, H heads, M head size, R state size, G groups of heads that share
# B and C, Q heads of a group; I = H * M and QM = Q * M are the same memory seen flat

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """What tokens bring to the recurrence.

    A token multiplies each head's state by `exp(log_decay)`, adds the outer product of its `x * dt`
    and `B` to it, and reads it with `C`. `log_decay` is nowhere positive.
    """

    x_LHM: torch.Tensor
    B_LGR: torch.Tensor
    C_LGR: torch.Tensor
    dt_LH: torch.Tensor
    log_decay_LH: torch.Tensor


def step(tokens: ScanInputs, state_SHMR: torch.Tensor) -> torch.Tensor:
    """Move each sequence's state by its one token, in place; return what that reads, [S, H, M].

    The first dimension of `tokens` counts sequences.
    """
    num_seqs, num_groups, state_size = tokens.B_LGR.shape
    state_SHMR.mul_(tokens.log_decay_LH.exp()[:, :, None, None])
    state_XQMR = state_SHMR.view(num_seqs * num_groups, -1, state_size)
    dx_XQM1 = (tokens.x_LHM * tokens.dt_LH[..., None]).view(num_seqs * num_groups, -1, 1)
    state_XQMR.baddbmm_(dx_XQM1, tokens.B_LGR.reshape(-1, 1, state_size))
    return torch.bmm(state_XQMR, tokens.C_LGR.reshape(-1, state_size, 1)).view_as(tokens.x_LHM)


def scan(tokens: ScanInputs, state_HMR: torch.Tensor) -> torch.Tensor:
    """Move the state along one piece of a run, in place; return what its tokens read, [L, H, M]."""
    cumulated_LH = tokens.log_decay_LH.cumsum(0)
    num_tokens = cumulated_LH.shape[0]
    is_seen_LL = torch.ones(
        num_tokens, num_tokens, dtype=torch.bool, device=cumulated_LH.device
    ).tril()
    y_LHM = _read(tokens, cumulated_LH, is_seen_LL, state_HMR)
    _advance(tokens, cumulated_LH, state_HMR)
    return y_LHM


def scan_branches(
    tokens: ScanInputs, branch_lens: list[int], state_HMR: torch.Tensor
) -> torch.Tensor:
    """Return what the tokens of branches read, [L, H, M], if each branch starts at the one state.

    The branches lie one after the other and are one piece together, in which no token sees those
    of another branch. The state stays as it is.
    """
    lens = torch.tensor(branch_lens, device=state_HMR.device)
    branch_L = torch.arange(len(branch_lens), device=state_HMR.device).repeat_interleave(lens)
    is_seen_LL = (branch_L[:, None] == branch_L).tril()
    cumulated_LH = is_seen_LL.float() @ tokens.log_decay_LH
    return _read(tokens, cumulated_LH, is_seen_LL, state_HMR)


def _read(
    tokens: ScanInputs,
    cumulated_LH: torch.Tensor,
    is_seen_LL: torch.Tensor,
    state_HMR: torch.Tensor,
) -> torch.Tensor:
    """Return what each token reads of the carried state and of the tokens that it sees.

    Decay between two tokens is a difference of what cumulated since the carried state. Where a
    token is not seen it may be positive without bound, so it is cut off before `exp`.
    """
    num_tokens, num_groups, state_size = tokens.C_LGR.shape
    C_GLR = tokens.C_LGR.transpose(0, 1)
    scores_GLL = torch.bmm(C_GLR, tokens.B_LGR.permute(1, 2, 0)).masked_fill_(~is_seen_LL, 0.0)
    cumulated_HL = cumulated_LH.T.contiguous()
    decay_HLL = (cumulated_HL[:, :, None] - cumulated_HL[:, None, :]).clamp_max_(0.0).exp_()
    decay_HLL.view(num_groups, -1, num_tokens, num_tokens).mul_(scores_GLL[:, None])
    dx_HLM = (tokens.x_LHM * tokens.dt_LH[..., None]).transpose(0, 1)
    y_LHM = torch.bmm(decay_HLL, dx_HLM).transpose(0, 1)

    carried_GLQM = torch.bmm(C_GLR, state_HMR.reshape(num_groups, -1, state_size).mT)
    carried_LHM = carried_GLQM.transpose(0, 1).reshape(tokens.x_LHM.shape)
    return carried_LHM.mul_(cumulated_LH.exp()[..., None]).add_(y_LHM)


def _advance(tokens: ScanInputs, cumulated_LH: torch.Tensor, state_HMR: torch.Tensor) -> None:
    """Move the state along all tokens, in place."""
    num_tokens, num_groups, state_size = tokens.B_LGR.shape
    total_H = cumulated_LH[-1]
    weight_LH = (total_H - cumulated_LH).exp_().mul_(tokens.dt_LH)
    dx_LGQM = (tokens.x_LHM * weight_LH[..., None]).view(num_tokens, num_groups, -1)
    state_HMR.mul_(total_H.exp()[:, None, None])
    state_GQMR = state_HMR.view(num_groups, -1, state_size)
    state_GQMR.baddbmm_(dx_LGQM.permute(1, 2, 0), tokens.B_LGR.transpose(0, 1))
