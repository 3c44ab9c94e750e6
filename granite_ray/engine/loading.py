"""Which weights a rank loads, from a checkpoint or made up: its own experts, and all the rest."""

import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import ModelConfig
from granite_ray.model.architecture import read_architecture
from granite_ray.model.granite import GraniteModel
from granite_ray.model.moe import MixtureOfExperts
from granite_ray.model.weights import dummy_layer, dummy_model, load_layer, load_weights
from granite_ray.parallel.experts import GroupDispatcher
from granite_ray.parallel.groups import Group
from granite_ray.parallel.place import check_size

DUMMY_SEED = 0
"""Fixed, so that every rank and every replica of a job gets the same random model."""


class Weights:
    """A checkpoint's weights as `model.load_format` and `model.dtype` say."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, device: torch.device) -> None:
        self._path = checkpoint.path
        self._is_dummy = model.load_format == "dummy"
        self._architecture = read_architecture(checkpoint.config)
        self._device = device
        self._dtype: torch.dtype = getattr(
            torch, self._architecture.dtype if model.dtype == "auto" else model.dtype
        )

    def load(self, group: Group | None) -> GraniteModel:
        """Load the model; of a group's experts, those of this rank.

        Raises:
            ConfigError: If the checkpoint does not fit, or has fewer experts than ranks.
        """
        architecture, dtype, device = self._architecture, self._dtype, self._device
        dispatcher = None
        if group is not None:
            check_size(group.size, architecture.num_local_experts)
            dispatcher = GroupDispatcher(group, architecture.num_local_experts, device)
        if self._is_dummy:
            return dummy_model(architecture, dtype, device, DUMMY_SEED, dispatcher)
        return load_weights(
            self._path, architecture, dtype=dtype, device=device, dispatcher=dispatcher
        )

    def load_layer(self, layer_index: int) -> MixtureOfExperts:
        """Load the router and all experts of one layer."""
        architecture, dtype, device = self._architecture, self._dtype, self._device
        if self._is_dummy:
            return dummy_layer(architecture, dtype, device, DUMMY_SEED, layer_index)
        return load_layer(self._path, architecture, dtype, device, layer_index)
