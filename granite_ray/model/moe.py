"""Routed experts: each token's few, chosen by a router, their outputs summed by weight."""

# T tokens, D hidden size, E local experts, K experts per token, I expert width, O output size,
# R rows: one for each token and chosen local expert, sorted by expert

import torch
import torch.nn.functional as F
from torch import nn

from granite_ray.model.architecture import Architecture
from granite_ray.model.layers import Linear, activate
from granite_ray.model.workspace import Workspace


class MixtureOfExperts(nn.Module):
    """The router and this rank's experts; ranks that hold all between them sum their outputs."""

    def __init__(self, architecture: Architecture, local_experts: range) -> None:
        super().__init__()
        self.local_experts = local_experts
        num_local, width = len(local_experts), architecture.expert_size
        self.router = Router(architecture)
        self.input_linear = ExpertLinear(num_local, architecture.hidden_size, 2 * width)
        self.output_linear = ExpertLinear(num_local, width, architecture.hidden_size)
        is_cuda = self.input_linear.weight.is_cuda
        self.run_experts = run_grouped if is_cuda else run_one_by_one

    def forward(self, x_TD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        expert_ids_TK, weights_TK = self.router(x_TD)
        num_local, num_chosen = len(self.local_experts), expert_ids_TK.shape[1]
        local_ids = expert_ids_TK.flatten() - self.local_experts.start
        is_elsewhere = (local_ids < 0) | (local_ids >= num_local)
        local_ids.masked_fill_(is_elsewhere, num_local)  # sorted to the end
        order = local_ids.argsort(stable=True)
        counts_E = _count(local_ids, num_local)
        routed_RD = workspace.take("routed", (len(order), x_TD.shape[1]), x_TD)
        torch.index_select(x_TD, 0, order // num_chosen, out=routed_RD)
        # One row more stands for what the experts of other ranks say; it does not count.
        out_RD = workspace.take("expert_out", (len(order) + 1, x_TD.shape[1]), x_TD)
        self.run_experts(self, routed_RD, counts_E, out_RD, workspace)
        rows_TK = torch.empty_like(order)
        rows_TK[order] = torch.arange(len(order), device=order.device)
        rows_TK.masked_fill_(is_elsewhere, len(order))
        return F.embedding_bag(
            rows_TK.view_as(expert_ids_TK),
            out_RD,
            mode="sum",
            per_sample_weights=weights_TK,
            padding_idx=len(order),
        )


def _count(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count ids below `num_experts`; `bincount` would wait for the device."""
    counts = expert_ids.new_zeros(num_experts + 1)
    return counts.index_add_(0, expert_ids, torch.ones_like(expert_ids))[:num_experts]


class Router(nn.Module):
    """Choose each token's experts."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.num_chosen = architecture.num_experts_per_tok
        self.layer = Linear(architecture.hidden_size, architecture.num_local_experts)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return expert ids and weights, [T, K] each; a token's weights sum to 1."""
        scores_TK, expert_ids_TK = self.layer(x_TD).float().topk(self.num_chosen, dim=-1)
        return expert_ids_TK, scores_TK.softmax(dim=-1).to(x_TD.dtype)


class ExpertLinear(nn.Module):
    """One weight for each expert."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))


def run_one_by_one(
    moe: MixtureOfExperts,
    routed_RD: torch.Tensor,
    counts_E: torch.Tensor,
    out_RD: torch.Tensor,
    workspace: Workspace,
) -> None:
    """Run the experts in use one after the other: what lies between stays in a CPU's cache."""
    counts = counts_E.tolist()
    width = moe.output_linear.weight.shape[2]
    gate_up = workspace.take("expert_gate_up", (max(counts), 2 * width), routed_RD)
    inner_RI = workspace.take("expert_inner", (max(counts), width), routed_RD)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start + count)
        input_ID, output_DI = moe.input_linear.weight[expert], moe.output_linear.weight[expert]
        torch.mm(routed_RD[rows], input_ID.t(), out=gate_up[:count])
        activate(gate_up[:count], inner_RI[:count])
        torch.mm(inner_RI[:count], output_DI.t(), out=out_RD[rows])
        start += count


def run_grouped(
    moe: MixtureOfExperts,
    routed_RD: torch.Tensor,
    counts_E: torch.Tensor,
    out_RD: torch.Tensor,
    workspace: Workspace,
) -> None:
    """Run all experts in two grouped products, without asking the device for the counts."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    gate_up = F.grouped_mm(routed_RD, moe.input_linear.weight.transpose(1, 2), offs=ends_E)
    inner_RI = workspace.take("expert_inner", (len(routed_RD), gate_up.shape[1] // 2), routed_RD)
    activate(gate_up, inner_RI)
    weight_EID = moe.output_linear.weight.transpose(1, 2)
    out_RD[: len(routed_RD)] = F.grouped_mm(inner_RI, weight_EID, offs=ends_E)
