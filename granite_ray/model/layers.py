"""What every decoder layer is made of: norm, linear map, rotation of heads, gated MLP."""

# T tokens, D hidden size, I inner width of an MLP, O output size, H heads, A head size, F half of A

import torch
import torch.nn.functional as F
from torch import nn

from granite_ray.model.kernels import MAX_TOKENS, CpuKernels, kernels_for
from granite_ray.model.workspace import Workspace

LEAST_ROWS = 4
"""Of a weight that the CPU kernel multiplies by."""


class RMSNorm(nn.Module):
    """Scale each token to unit mean square in float32, then by a weight in the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernels = kernels_for(self.weight, (size, 16))

    def forward(self, x_TD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        shape = tuple(x_TD.shape)
        if self.kernels is not None:
            out_TD = workspace.take("norm_out", shape, x_TD)
            self.kernels.norm(x_TD, self.weight, self.eps, out_TD)
            return out_TD
        wide_TD = workspace.take("norm_wide", shape, x_TD, torch.float32).copy_(x_TD)
        lengths_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
        wide_TD.mul_((lengths_T1.square() / shape[1] + self.eps).rsqrt())
        return workspace.take("norm_out", shape, x_TD).copy_(wide_TD).mul_(self.weight)


class Linear(nn.Module):
    """Multiply by a weight, into a given buffer if there is one; add a bias if there is one."""

    def __init__(self, input_size: int, output_size: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.empty(output_size)) if has_bias else None
        fits = not has_bias and output_size >= LEAST_ROWS
        self.kernels = kernels_for(self.weight, (input_size, 32)) if fits else None

    def forward(self, x_TD: torch.Tensor, out_TO: torch.Tensor | None = None) -> torch.Tensor:
        if self.bias is not None:
            return torch.addmm(self.bias, x_TD, self.weight.t(), out=out_TO)
        if self.kernels is None or len(x_TD) > MAX_TOKENS:
            return torch.mm(x_TD, self.weight.t(), out=out_TO)
        if out_TO is None:
            out_TO = x_TD.new_empty(len(x_TD), len(self.weight))
        self.kernels.linear(x_TD, self.weight, out_TO)
        return out_TO


class GatedMLP(nn.Module):
    """The MLP that every token passes; rows of the first weight: gate half, then up half."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.input_linear = Linear(hidden_size, 2 * mlp_size)
        self.output_linear = Linear(mlp_size, hidden_size)
        self.kernels = kernels_for(self.output_linear.weight, (mlp_size, 16))

    def forward(self, x_TD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        num_tokens, inner_size = len(x_TD), self.output_linear.weight.shape[1]
        gate_up = workspace.take("mlp_gate_up", (num_tokens, 2 * inner_size), x_TD)
        inner_TI = workspace.take("mlp_inner", (num_tokens, inner_size), x_TD)
        out_TD = workspace.take("mlp_out", tuple(x_TD.shape), x_TD)
        activate(self.input_linear(x_TD, gate_up), inner_TI, self.kernels)
        self.output_linear(inner_TI, out_TD)
        return out_TD


def activate(
    gate_up: torch.Tensor, inner_TI: torch.Tensor, kernels: CpuKernels | None = None
) -> None:
    """Write silu(gate) * up; may overwrite the gate half."""
    if kernels is not None:
        kernels.gate(gate_up, inner_TI)
        return
    gate_TI, up_TI = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate_TI, inplace=True), up_TI, out=inner_TI)


def rotation_tables(
    positions_T: torch.Tensor, theta: float, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of each token's angles, found in float32: [T, 1, F] each."""
    exponents_F = torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim
    angles_TF = positions_T.float()[:, None] * (1.0 / theta**exponents_F)
    return angles_TF.cos().to(dtype)[:, None], angles_TF.sin().to(dtype)[:, None]


def rotate(heads_THA: torch.Tensor, cos_T1F: torch.Tensor, sin_T1F: torch.Tensor) -> None:
    """Rotate heads in place; the partner of a dimension stands half a head further."""
    first_THF, second_THF = heads_THA.chunk(2, dim=-1)
    rotated_THF = (first_THF * cos_T1F).addcmul_(second_THF, sin_T1F, value=-1)
    second_THF.mul_(cos_T1F).addcmul_(first_THF, sin_T1F)
    first_THF.copy_(rotated_THF)
