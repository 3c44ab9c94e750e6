"""Element-wise pieces of the network, in float32 whatever they are given; compiled for speed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MASKED = -1e9

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The pieces, plain or compiled."""

    normalize: Callable[..., torch.Tensor]
    add_normalize: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rotate: Callable[..., torch.Tensor]
    attention_weights: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[..., torch.Tensor]
    weigh: Callable[..., torch.Tensor]
    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def make_kernels(*, is_compiled: bool) -> Kernels:
    """Return the pieces; compiled ones take half a minute at first use."""
    plain: tuple[Kernel, ...] = (
        _normalize,
        _add_normalize,
        _rotate,
        _attention_weights,
        _swiglu,
        _weigh,
        _losses,
    )
    if not is_compiled:
        return Kernels(*plain)
    return Kernels(*(torch.compile(one, dynamic=True) for one in plain))


def _normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * scaled).to(x.dtype)


def _add_normalize(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, multiplier: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x + added * multiplier
    return x, _normalize(x, weight, eps)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    left, right = x.float().chunk(2, -1)
    cosines, sines = cosines[:, None], sines[:, None]
    turned = [left * cosines - right * sines, right * cosines + left * sines]
    return torch.cat(turned, -1).to(x.dtype)


def _attention_weights(
    shared: torch.Tensor, own: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    length = own.shape[-1]
    places = torch.arange(length, device=own.device)
    is_later = places[None, :] > places[:, None]
    wide_own = (own.float() * scale).masked_fill(is_later, MASKED)
    wide_shared = shared.float() * scale
    highest = torch.maximum(wide_own.amax(-1, keepdim=True), wide_shared.amax(-1, keepdim=True))
    highest = highest.detach()
    of_shared, of_own = (wide_shared - highest).exp(), (wide_own - highest).exp()
    total = of_shared.sum(-1, keepdim=True) + of_own.sum(-1, keepdim=True)
    return (of_shared / total).to(own.dtype), (of_own / total).to(own.dtype)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


def _weigh(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (rows.float() * weights[..., None]).sum(1).to(rows.dtype)


def _losses(
    logits: torch.Tensor, targets: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.float() / scaling
    at_target = wide.gather(-1, targets[:, None])[:, 0]
    return wide.logsumexp(-1) - at_target, at_target >= wide.amax(-1)
