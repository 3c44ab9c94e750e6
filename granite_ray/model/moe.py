"""Routed experts: each token's few, chosen by a router, their outputs summed by weight."""

# T tokens, D hidden size, E local experts, K experts per token, I expert width, O output size,
# N tokens that have an expert here, R rows: one for each such token and local expert, by expert

import torch
import torch.nn.functional as F
from torch import nn

from granite_ray.model.architecture import Architecture
from granite_ray.model.kernels import MAX_TOKENS, ROWS_A_TASK, kernels_for
from granite_ray.model.layers import Linear, activate
from granite_ray.model.workspace import Workspace
from granite_ray.parallel.experts import Arrived, Dispatcher


class MixtureOfExperts(nn.Module):
    """The router and this rank's experts; the dispatcher brings tokens to all ranks' experts."""

    def __init__(self, architecture: Architecture, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        num_local, width = len(dispatcher.local_experts), architecture.expert_size
        self.router = Router(architecture)
        self.input_linear = ExpertLinear(num_local, architecture.hidden_size, 2 * width)
        self.output_linear = ExpertLinear(num_local, width, architecture.hidden_size)
        multiples = (architecture.hidden_size, 32), (width, ROWS_A_TASK)
        self.kernels = kernels_for(self.output_linear.weight, *multiples)
        is_cuda = self.input_linear.weight.is_cuda
        self.run_experts = run_grouped if is_cuda else run_one_by_one

    def forward(self, x_TD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        expert_ids_TK, weights_TK = self.router(x_TD)
        arrived, routing = self.dispatcher.dispatch(x_TD, expert_ids_TK, weights_TK, workspace)
        return self.dispatcher.combine(self._ask(arrived, workspace), routing, workspace)

    def _ask(self, arrived: Arrived, workspace: Workspace) -> torch.Tensor:
        """Return for each token the weighted sum of what this rank's experts say, [N, D]."""
        if self.kernels is not None and len(arrived.x_ND) <= MAX_TOKENS:
            expert_weights = self.input_linear.weight, self.output_linear.weight
            return self.kernels.experts(
                arrived.x_ND.contiguous(),
                arrived.expert_ids_NK.contiguous(),
                arrived.weights_NK.contiguous(),
                expert_weights,
                workspace,
            )
        num_local, num_pairs = len(self.dispatcher.local_experts), arrived.num_pairs
        x_ND, expert_ids_NK = arrived.x_ND, arrived.expert_ids_NK
        expert_ids, num_chosen = expert_ids_NK.flatten(), expert_ids_NK.shape[1]
        counts_E = _count(expert_ids, num_local)
        order = expert_ids.argsort(stable=True)[:num_pairs]  # those elsewhere come last
        routed_RD = workspace.take("routed", (num_pairs, x_ND.shape[1]), x_ND)
        torch.index_select(x_ND, 0, order // num_chosen, out=routed_RD)
        # One row more stands for what the experts of other ranks say; it does not count.
        out_RD = workspace.take("expert_out", (num_pairs + 1, x_ND.shape[1]), x_ND)
        self.run_experts(self, routed_RD, counts_E, out_RD, workspace)
        rows_NK = torch.full_like(expert_ids, num_pairs)
        rows_NK[order] = torch.arange(num_pairs, device=order.device)
        return F.embedding_bag(
            rows_NK.view_as(expert_ids_NK),
            out_RD,
            mode="sum",
            per_sample_weights=arrived.weights_NK,
            padding_idx=num_pairs,
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
        scores_TE = self.layer(x_TD)
        if self.layer.kernels is not None and len(x_TD) <= MAX_TOKENS:
            return self.layer.kernels.route(scores_TE, self.num_chosen)
        scores_TK, expert_ids_TK = scores_TE.float().topk(self.num_chosen, dim=-1)
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
    width, most = moe.output_linear.weight.shape[2], max(counts, default=0)
    gate_up = workspace.take("expert_gate_up", (most, 2 * width), routed_RD)
    inner_RI = workspace.take("expert_inner", (most, width), routed_RD)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start + count)
        input_ID, output_DI = moe.input_linear.weight[expert], moe.output_linear.weight[expert]
        torch.mm(routed_RD[rows], input_ID.t(), out=gate_up[:count])
        activate(gate_up[:count], inner_RI[:count], moe.kernels)
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
