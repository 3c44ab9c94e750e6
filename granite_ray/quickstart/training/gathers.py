"""Gathers and the experts' products, with gradients that are gathers and products too.

Autograd would add up into zeroed tensors where each row has one place: several times as slow on a
CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch


class _Permute(torch.autograd.Function):
    """Rows in another order; `back` is the inverse of `index`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back], None, None


class _Pad(torch.autograd.Function):
    """Rows laid out as a padded table; what padding repeats has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, padded: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x[padded]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad[places], None, None


class _Unpad(torch.autograd.Function):
    """The rows of a padded table without the padding."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.num_places = len(table)
        return table[places]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.num_places, *grad.shape[1:])
        whole[places] = grad
        return whole, None


class _Spread(torch.autograd.Function):
    """Each row as many times as it has experts, sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, num_copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_copies = num_copies
        return x[rows]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.num_copies)).sum(1), None, None, None


class _ExpertLinear(torch.autograd.Function):
    """Each expert's rows times its matrix: rows sorted by expert, `sizes` of each."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sizes: Sequence[int], *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.sizes = sizes
        out = x.new_empty(len(x), len(weights[0]))
        for own, result, weight in zip(x.split(sizes), out.split(sizes), weights, strict=True):
            torch.mm(own, weight.T, out=result)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        of_weights = []
        for own, given, result, weight in zip(
            x.split(ctx.sizes),
            grad.split(ctx.sizes),
            grad_x.split(ctx.sizes),
            weights,
            strict=True,
        ):
            torch.mm(given, weight, out=result)
            of_weights.append(given.T @ own)
        return grad_x, None, *of_weights


# torch tells no types of `apply`: these do.


def permute(x: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Return rows in another order; `back` is the inverse of `index`."""
    out: torch.Tensor = _Permute.apply(x, index, back)  # type: ignore[no-untyped-call]
    return out


def pad(x: torch.Tensor, padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return rows laid out as a padded table: `padded` holds the row of each place."""
    out: torch.Tensor = _Pad.apply(x, padded, places)  # type: ignore[no-untyped-call]
    return out


def unpad(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return a padded table's rows, given the place of each."""
    out: torch.Tensor = _Unpad.apply(table, places)  # type: ignore[no-untyped-call]
    return out


def spread(
    x: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, num_copies: int
) -> torch.Tensor:
    """Return each row so many times, in the order that `inverse` is the inverse of."""
    out: torch.Tensor = _Spread.apply(x, rows, inverse, num_copies)  # type: ignore[no-untyped-call]
    return out


def expert_linear(
    x: torch.Tensor, sizes: Sequence[int], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return rows sorted by expert, so many for each, times their expert's weight."""
    out: torch.Tensor = _ExpertLinear.apply(x, sizes, *weights)  # type: ignore[no-untyped-call]
    return out
