"""Memory for intermediate tensors, allocated once and used again in every layer and step.

Fresh memory of this size comes from the operating system page by page, which can cost a CPU more
time than the arithmetic that fills it.
"""

import math

import torch


class Workspace:
    """Buffers by name: each holds one intermediate tensor at a time and grows when it must."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        like: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return the buffer `name` in this shape, its content undefined, of the kind of `like`.

        It is the caller's until the same name is taken again: a name belongs to one place in the
        code, and what is taken there must not be needed when that place comes round again.
        """
        num_elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_elements:
            buffer = torch.empty(num_elements, dtype=dtype or like.dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[:num_elements].view(shape)
