"""A rank's model as if it had no others: all experts are here, those of one layer at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from granite_ray.model.granite import GraniteModel
from granite_ray.model.moe import MixtureOfExperts
from granite_ray.model.workspace import Workspace

ReadLayer = Callable[[int], MixtureOfExperts]
"""Returns the router and all experts of a layer, freshly read."""


@contextmanager
def computing_alone(model: GraniteModel, read_layer: ReadLayer) -> Iterator[None]:
    """Let a model compute without its group, to see whether both say the same.

    Every layer of every step is read anew: for a look, not for work.
    """
    for index, layer in enumerate(model.decoder_layers):
        layer.feed_forwards[0] = _ReadWhenAsked(partial(read_layer, index))
    try:
        yield
    finally:
        for layer in model.decoder_layers:
            layer.feed_forwards[0] = layer.block_sparse_moe


class _ReadWhenAsked(nn.Module):
    def __init__(self, read: Callable[[], MixtureOfExperts]) -> None:
        super().__init__()
        self._read = read

    def forward(self, x_TD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        out_TD: torch.Tensor = self._read()(x_TD, workspace)
        return out_TD
