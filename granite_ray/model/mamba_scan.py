"""The recurrence of a Mamba2 layer in float32: states move along tokens, outputs are read of them.

A run of tokens is taken in pieces: within a piece each token reads the earlier ones in a quadratic
form, like attention without softmax; from piece to piece only the state is carried. Knows nothing
of projections and batches.
"""

# L tokens of a piece, N of them that read, S sequences, Z state slots, H heads, M head size,
# R state size, G groups of heads that share B and C, Q heads of a group; QM = Q * M, seen flat

from dataclasses import dataclass

import torch

READ_LENGTH = 128
"""The most tokens of a trie that read at a time: their weights take [H, N, L] numbers."""


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """What tokens bring to the recurrence.

    A token multiplies each head's state by `exp(log_decay)`, adds the outer product of its `x * dt`
    and `B`, then reads the state with `C`. `log_decay` is nowhere positive.
    """

    x_LHM: torch.Tensor
    B_LGR: torch.Tensor
    C_LGR: torch.Tensor
    dt_LH: torch.Tensor
    log_decay_LH: torch.Tensor

    def rows(self, start: int, stop: int) -> "ScanInputs":
        """Return the tokens from `start` up to `stop`."""
        rows = slice(start, stop)
        return ScanInputs(
            self.x_LHM[rows],
            self.B_LGR[rows],
            self.C_LGR[rows],
            self.dt_LH[rows],
            self.log_decay_LH[rows],
        )


def step_each(
    tokens: ScanInputs, ssm_state_ZHMR: torch.Tensor, slots_S: torch.Tensor
) -> torch.Tensor:
    """Move each slot's state by its sequence's one token; return what that reads, [S, H, M].

    One by one in place: on a CPU a state then stays in the cache while it is worked on. The
    dimension of tokens counts sequences.
    """
    return torch.cat(
        [
            _step(tokens.rows(index, index + 1), ssm_state_ZHMR[slot : slot + 1])
            for index, slot in enumerate(slots_S.tolist())
        ]
    )


def step_together(
    tokens: ScanInputs, ssm_state_ZHMR: torch.Tensor, slots_S: torch.Tensor
) -> torch.Tensor:
    """Do the same as `step_each` in a few large operations, as accelerators like it."""
    state_SHMR = ssm_state_ZHMR[slots_S]
    y_SHM = _step(tokens, state_SHMR)
    ssm_state_ZHMR[slots_S] = state_SHMR
    return y_SHM


def scan(tokens: ScanInputs, state_HMR: torch.Tensor) -> torch.Tensor:
    """Move the state along one piece of a run, in place; return what its tokens read, [L, H, M]."""
    decayed_LH = tokens.log_decay_LH.cumsum(0, dtype=torch.float64)
    is_seen_LL = decayed_LH.new_ones(len(decayed_LH), len(decayed_LH), dtype=torch.bool).tril()
    y_LHM = _read(tokens, decayed_LH, is_seen_LL, state_HMR)
    _advance(tokens, decayed_LH, state_HMR)
    return y_LHM


def scan_trie(
    tokens: ScanInputs, is_seen_LL: torch.Tensor, state_HMR: torch.Tensor
) -> torch.Tensor:
    """Return what the tokens of a trie read, [L, H, M], if its first ones start at the one state.

    They are one piece, in which a token sees its ancestors and itself, all of them before it. The
    state stays as it is.
    """
    decayed_LH = is_seen_LL.double() @ tokens.log_decay_LH.double()
    blocks = []
    for start in range(0, len(is_seen_LL), READ_LENGTH):
        stop = min(start + READ_LENGTH, len(is_seen_LL))
        is_seen_NL = is_seen_LL[start:stop, :stop]
        blocks.append(_read(tokens.rows(0, stop), decayed_LH[:stop], is_seen_NL, state_HMR))
    return torch.cat(blocks)


def _step(tokens: ScanInputs, state_SHMR: torch.Tensor) -> torch.Tensor:
    num_seqs, num_groups, state_size = tokens.B_LGR.shape
    dx_SHM1 = (tokens.x_LHM * tokens.dt_LH[..., None])[..., None]
    state_SHMR.mul_(tokens.log_decay_LH.exp()[..., None, None])
    state_SHMR.view(num_seqs, num_groups, -1, state_size).addcmul_(
        dx_SHM1.view(num_seqs, num_groups, -1, 1), tokens.B_LGR[:, :, None]
    )
    columns = tokens.C_LGR.reshape(-1, state_size, 1)
    return torch.bmm(state_SHMR.view(len(columns), -1, state_size), columns).view_as(tokens.x_LHM)


def _read(
    tokens: ScanInputs,
    decayed_LH: torch.Tensor,
    is_seen_NL: torch.Tensor,
    state_HMR: torch.Tensor,
) -> torch.Tensor:
    """Return what the last N tokens read of the carried state and of those they see, [N, H, M].

    `decayed_LH` is the logarithm of the decay since the carried state, in float64: sums of
    thousands are subtracted below, and what is left must be right to the digits of float32.
    """
    num_read, num_tokens = is_seen_NL.shape
    num_groups, state_size = tokens.C_LGR.shape[1:]
    C_GNR = tokens.C_LGR[-num_read:].transpose(0, 1)
    scores_GNL = torch.bmm(C_GNR, tokens.B_LGR.permute(1, 2, 0)).mul_(is_seen_NL)
    # Where a token is not seen the difference may be positive and overflow; its score is 0 there.
    decayed_HL = decayed_LH.T.contiguous()
    decay_HNL = decayed_HL[:, -num_read:, None] - decayed_HL[:, None]
    weights_HNL = decay_HNL.float().clamp_max_(0.0).exp_()
    weights_HNL.view(num_groups, -1, num_read, num_tokens).mul_(scores_GNL[:, None])
    dx_LHM = tokens.x_LHM * tokens.dt_LH[..., None]
    read_NHM = torch.bmm(weights_HNL, dx_LHM.transpose(0, 1)).transpose(0, 1)

    state_GQMR = state_HMR.view(num_groups, -1, state_size)
    carried_NGQM = torch.bmm(C_GNR, state_GQMR.mT).transpose(0, 1)
    y_NHM = carried_NGQM.reshape(read_NHM.shape)
    return y_NHM.mul_(decayed_LH[-num_read:].exp().float()[..., None]).add_(read_NHM)


def _advance(tokens: ScanInputs, decayed_LH: torch.Tensor, state_HMR: torch.Tensor) -> None:
    num_tokens, num_groups, state_size = tokens.B_LGR.shape
    end_H = decayed_LH[-1]
    weights_LH = (end_H - decayed_LH).exp_().float().mul_(tokens.dt_LH)
    dx_LGQM = (tokens.x_LHM * weights_LH[..., None]).view(num_tokens, num_groups, -1)
    state_HMR.mul_(end_H.exp().float()[:, None, None])
    state_GQMR = state_HMR.view(num_groups, -1, state_size)
    state_GQMR.baddbmm_(dx_LGQM.permute(1, 2, 0), tokens.B_LGR.transpose(0, 1))
