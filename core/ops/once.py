"""Gradients that are worked out by hand and have no gradient themselves: whoever asks for one is told.

torch's `once_differentiable` refuses a second derivative only where the gradients of the outputs have a graph. Where
the inputs alone have one, as in the gradient of a plain sum, it hands the gradient out as a constant: a penalty on it,
added to another term, would teach nothing and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class _Final(torch.autograd.Function):
    """A gradient that has none itself, though it depends on what is given with it."""

    @staticmethod
    def forward(ctx: Any, what: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.what = what
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.what}: differentiable once, its gradient has no gradient (create_graph)")


def once_differentiable(what: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the `backward` of an `autograd.Function`, whose operation is called `what` in the RuntimeError of a second
    derivative with respect to anything that it saved or was given. The first one is never refused."""

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: Any, *upstream: Tensor | None) -> Gradients:
            with torch.no_grad():
                found = backward(ctx, *upstream)
            if not torch.is_grad_enabled():
                return found
            given = [x for x in (*ctx.saved_tensors, *upstream) if x is not None]
            return tuple(None if x is None else _Final.apply(what, x, *given) for x in found)  # type: ignore[no-untyped-call]

        return run

    return decorate
