"""The Granite decoder: token ids of many sequences in, logits of the wanted positions out."""

# T tokens, D hidden size, V vocabulary size, L positions whose logits are wanted

import torch
import torch.nn.functional as F
from torch import nn

from granite_ray.model.architecture import Architecture
from granite_ray.model.attention import Attention
from granite_ray.model.attention_plan import AttentionPlan, plan_attention
from granite_ray.model.batch import ForwardBatch
from granite_ray.model.layers import GatedMLP, Linear, RMSNorm
from granite_ray.model.mamba import MambaMixer
from granite_ray.model.moe import MixtureOfExperts
from granite_ray.model.state import ModelState
from granite_ray.model.workspace import Workspace
from granite_ray.parallel.experts import Dispatcher, LocalDispatcher


class GraniteModel(nn.Module):
    """All layers of a Granite checkpoint, the embedding and the head.

    Parameters are made in torch's default dtype on its default device, their content undefined.

    Args:
        architecture: What the checkpoint says.
        dispatcher: Says which experts are here, by default all, and reaches the others.

    Attributes:
        num_layers_run: Grows with every layer of every step: a sign of life.
    """

    def __init__(self, architecture: Architecture, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_layers_run = 0
        self.workspace = Workspace()
        if dispatcher is None:
            dispatcher = LocalDispatcher(range(architecture.num_local_experts))
        self.dispatcher = dispatcher
        self.embed_tokens = Linear(architecture.hidden_size, architecture.vocab_size)
        self.layers = nn.ModuleList(
            DecoderLayer(architecture, layer_index, dispatcher)
            for layer_index in range(len(architecture.layer_types))
        )
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        if not architecture.tie_word_embeddings:
            self.lm_head = Linear(architecture.hidden_size, architecture.vocab_size)
        self.requires_grad_(False)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, state: ModelState) -> torch.Tensor:
        """Run one step; return logits of `batch.logits_indices_L` in float32, [L, V]."""
        plan = plan_attention(batch, state, self.architecture)
        return self.run(batch, plan, state, self.workspace)

    def run(
        self, batch: ForwardBatch, plan: AttentionPlan, state: ModelState, workspace: Workspace
    ) -> torch.Tensor:
        """Do what `forward` does for a plan that is made."""
        architecture = self.architecture
        x_TD = F.embedding(batch.token_ids_T, self.embed_tokens.weight)
        x_TD *= architecture.embedding_multiplier
        for layer in self.layers:
            layer(x_TD, batch, plan, state, workspace)
            self.num_layers_run += 1
        normed_LD = self.norm(x_TD[batch.logits_indices_L], workspace)
        head = self.embed_tokens if architecture.tie_word_embeddings else self.lm_head
        logits_LV = workspace.take("logits", (len(normed_LD), architecture.vocab_size), x_TD)
        head(normed_LD, logits_LV)
        # A copy in any dtype: the buffer is written anew by the next step.
        return logits_LV.to(torch.float32, copy=True).div_(architecture.logits_scaling)

    @torch.inference_mode()
    def run_empty(self) -> None:
        """Take part, without tokens, in a step of the ranks that share the experts."""
        weight = self.norm.weight
        no_tokens = weight.new_empty((0, len(weight)))
        for layer in self.decoder_layers:
            if self.architecture.num_local_experts:
                layer.block_sparse_moe(no_tokens, self.workspace)
            self.num_layers_run += 1

    @property
    def decoder_layers(self) -> list["DecoderLayer"]:
        """The layers, known as what they are."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


class DecoderLayer(nn.Module):
    """A mixer, then the feed-forward networks; adds what each says to the tokens, in place."""

    def __init__(
        self, architecture: Architecture, layer_index: int, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        hidden_size, eps = architecture.hidden_size, architecture.rms_norm_eps
        self.layer_type = architecture.layer_types[layer_index]
        self.state_index = architecture.layer_types[:layer_index].count(self.layer_type)
        self.residual_multiplier = architecture.residual_multiplier
        self.input_layernorm = RMSNorm(hidden_size, eps)
        if self.layer_type == "attention":
            self.self_attn = Attention(architecture)
        else:
            self.mamba = MambaMixer(architecture)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.feed_forwards: list[nn.Module] = []
        if architecture.num_local_experts:
            self.block_sparse_moe = MixtureOfExperts(architecture, dispatcher)
            self.feed_forwards.append(self.block_sparse_moe)
        if architecture.mlp_size:
            self.shared_mlp = GatedMLP(hidden_size, architecture.mlp_size)
            self.feed_forwards.append(self.shared_mlp)

    def forward(
        self,
        x_TD: torch.Tensor,
        batch: ForwardBatch,
        plan: AttentionPlan,
        state: ModelState,
        workspace: Workspace,
    ) -> None:
        normed_TD = self.input_layernorm(x_TD, workspace)
        mixed_TD = self._mix(normed_TD, batch, plan, state, workspace)
        x_TD.add_(mixed_TD, alpha=self.residual_multiplier)
        normed_TD = self.post_attention_layernorm(x_TD, workspace)
        for feed_forward in self.feed_forwards:
            x_TD.add_(feed_forward(normed_TD, workspace), alpha=self.residual_multiplier)

    def _mix(
        self,
        x_TD: torch.Tensor,
        batch: ForwardBatch,
        plan: AttentionPlan,
        state: ModelState,
        workspace: Workspace,
    ) -> torch.Tensor:
        index = self.state_index
        if self.layer_type == "attention":
            caches = state.key_caches[index], state.value_caches[index]
            mixed_TD: torch.Tensor = self.self_attn(x_TD, plan, *caches, workspace)
        else:
            states = state.conv_states[index], state.ssm_states[index]
            mixed_TD = self.mamba(x_TD, batch, *states, workspace)
        return mixed_TD
