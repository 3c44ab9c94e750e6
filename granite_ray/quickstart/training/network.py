"""The embedded model as it is trained: Granite's mixture of experts over flat tokens.

transformers' own class gives the same logits (a test compares them), but pads, and visits its
experts in a way that costs a CPU several times as long. Here everything but attention works on the
tokens of a whole step at once; rows that begin with the same prompt share its computation.
"""

# T tokens, C model width, H query heads, K key and value heads, D head size, E experts, A experts a
# token

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GraniteMoeConfig

from granite_ray.model.architecture import Architecture, read_architecture
from granite_ray.quickstart.training.attention import attend_group, rotation
from granite_ray.quickstart.training.batches import Batch, RowGroup
from granite_ray.quickstart.training.gathers import expert_linear, permute, spread
from granite_ray.quickstart.training.kernels import Kernels, make_kernels

EMBEDDING_STD = 0.1

Rotation = tuple[torch.Tensor, torch.Tensor]


class Network(nn.Module):
    """Weights in float32, computed with in `dtype`; drawn from a seed."""

    def __init__(
        self,
        config: GraniteMoeConfig,
        seed: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        is_compiled: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.architecture = read_architecture(config.to_dict())
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * std)

        width = config.hidden_size
        self.embedding = matrix(config.vocab_size, width, EMBEDDING_STD)
        layers = [Layer(self.architecture, matrix) for _ in self.architecture.layer_types]
        self.layers: Sequence[Layer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = nn.Parameter(torch.ones(width))
        self.dtype = dtype
        self.kernels = make_kernels(is_compiled=is_compiled)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what became of the predictions, and how unevenly experts are used.

        Returns:
            the cross-entropy of each target, in nats; whether each target is the likeliest token;
            and the load-balancing loss, averaged over layers: 1 where experts are used evenly.
        """
        config, kernels = self.architecture, self.kernels
        eps = config.rms_norm_eps
        embedding = self.embedding.to(self.dtype)
        x_TC = F.embedding(batch.token_ids_T, embedding) * config.embedding_multiplier
        h_TC = kernels.normalize(x_TC, self.layers[0].input_norm, eps)
        angles = rotation(config, batch.positions_T)
        imbalance = torch.zeros((), device=x_TC.device)
        for index, layer in enumerate(self.layers):
            mixed_TC = layer.attend(h_TC, batch.groups, angles, kernels)
            x_TC, h_TC = kernels.add_normalize(
                x_TC, mixed_TC, layer.expert_norm, config.residual_multiplier, eps
            )
            mixed_TC, uneven = layer.consult(h_TC, kernels)
            imbalance = imbalance + uneven / len(self.layers)
            is_last = index + 1 == len(self.layers)
            norm = self.norm if is_last else self.layers[index + 1].input_norm
            x_TC, h_TC = kernels.add_normalize(
                x_TC, mixed_TC, norm, config.residual_multiplier, eps
            )
        logits = h_TC[batch.read] @ embedding.T
        losses, hits = kernels.losses(logits, batch.targets, config.logits_scaling)
        return losses, hits, imbalance

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Return the weights in bfloat16 under the names of the `granitemoe` format."""
        named: dict[str, torch.Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm,
        }
        for index, layer in enumerate(self.layers):
            for name, weight in layer.checkpoint().items():
                named[f"model.layers.{index}.{name}.weight"] = weight
        return {name: weight.detach().bfloat16().contiguous() for name, weight in named.items()}


class Layer(nn.Module):
    """Attention and experts, each with its norm."""

    def __init__(
        self, config: Architecture, matrix: Callable[[int, int, float], nn.Parameter]
    ) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.expert_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_size = config.head_dim
        self.scale = config.attention_multiplier
        self.num_chosen = config.num_experts_per_tok
        self.input_norm = nn.Parameter(torch.ones(width))
        self.expert_norm = nn.Parameter(torch.ones(width))
        std = width**-0.5
        kv_width = self.num_kv_heads * self.head_size
        self.query = matrix(width, width, std)
        self.key = matrix(kv_width, width, std)
        self.value = matrix(kv_width, width, std)
        self.out = matrix(width, width, std)
        self.router = matrix(config.num_local_experts, width, std)
        experts = range(config.num_local_experts)
        self.gates = nn.ParameterList(matrix(inner, width, std) for _ in experts)
        self.ups = nn.ParameterList(matrix(inner, width, std) for _ in experts)
        self.downs = nn.ParameterList(matrix(width, inner, inner**-0.5) for _ in experts)

    def attend(
        self,
        h_TC: torch.Tensor,
        groups: Sequence[RowGroup],
        angles: Rotation,
        kernels: Kernels,
    ) -> torch.Tensor:
        """Return what attention adds, [T, C]."""
        num_queries, num_keys = self.num_heads, self.num_heads + self.num_kv_heads
        weight = torch.cat([self.query, self.key, self.value]).to(h_TC.dtype)
        qkv = (h_TC @ weight.T).unflatten(-1, (-1, self.head_size))
        q_THD, k_TKD = kernels.rotate(qkv[:, :num_keys], *angles).split(
            [num_queries, self.num_kv_heads], 1
        )
        v_TKD = qkv[:, num_keys:]
        seen = [
            part
            for group in groups
            for part in attend_group(group, q_THD, k_TKD, v_TKD, self.scale, kernels)
        ]
        return torch.cat(seen) @ self.out.to(h_TC.dtype).T

    def consult(self, h_TC: torch.Tensor, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the chosen experts add, [T, C], and how unevenly they were chosen.

        The unevenness is the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4).
        """
        num_experts = len(self.downs)
        logits_TE = (h_TC @ self.router.to(h_TC.dtype).T).float()
        weights_TA, experts_TA = logits_TE.topk(self.num_chosen)
        weights_TA = weights_TA.softmax(-1)
        order = experts_TA.flatten().argsort(stable=True)
        counts = experts_TA.flatten().bincount(minlength=num_experts)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        sizes = counts.tolist()
        sorted_rows = spread(h_TC, order // self.num_chosen, inverse, self.num_chosen)
        gate_up = [torch.cat(pair) for pair in zip(self.gates, self.ups, strict=True)]
        inner = expert_linear(sorted_rows, sizes, [w.to(h_TC.dtype) for w in gate_up])
        downs = [weight.to(h_TC.dtype) for weight in self.downs]
        out = expert_linear(kernels.swiglu(inner), sizes, downs)
        mixed_TC = kernels.weigh(
            permute(out, inverse, order).unflatten(0, (-1, self.num_chosen)), weights_TA
        )
        shares = counts / counts.sum()
        uneven = num_experts * (shares * logits_TE.softmax(-1).mean(0)).sum()
        return mixed_TC, uneven

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Return the weights under the names that they have in a layer of the format."""
        gate_up = [torch.cat(pair) for pair in zip(self.gates, self.ups, strict=True)]
        return {
            "input_layernorm": self.input_norm,
            "post_attention_layernorm": self.expert_norm,
            "self_attn.q_proj": self.query,
            "self_attn.k_proj": self.key,
            "self_attn.v_proj": self.value,
            "self_attn.o_proj": self.out,
            "block_sparse_moe.router.layer": self.router,
            "block_sparse_moe.input_linear": torch.stack(gate_up),
            "block_sparse_moe.output_linear": torch.stack(list(self.downs)),
        }
