"""Tensors whose numbers are not there, for running what only their shapes decide: at most sizes, in no memory.

Inside `ShapesOnly` a floating-point tensor is a single 1, expanded to its shape: operators on it return others like it
and compute nothing. Integers and booleans are real, so that what they decide (lengths, masks, which rows are read) is
decided as ever; those that come of floating-point numbers (comparisons, indices of a maximum) are true and 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_META = torch.device("meta")


class ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the module. A `FlopCounterMode` that is to see the operators must be entered after it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, Any] = {}
        self.operators = 0
        """Called so far, without those that only look at memory in another way."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view or torch.Tag.inplace_view in func.tags:  # of a single number, too
            return func(*args, **kwargs)
        self.operators += 1
        flat, structure = tree_flatten((args, kwargs))
        hollow = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in flat)
        written = _written(func, args, kwargs)
        if written:
            if hollow:
                return written[0] if len(written) == 1 else tuple(written)
            return func(*args, **kwargs)
        made = self._shapes(func, flat, structure) if hollow or not _has_tensor(flat) else None
        if made is None or not (hollow or _any_floating(made)):
            return func(*args, **kwargs)
        return tree_map(_stand_in, made)

    def _shapes(self, func: Any, flat: Sequence[Any], structure: Any) -> Any:
        """What the operator returns, on the meta device."""
        key = (func, structure, tuple(_signature(leaf) for leaf in flat))
        try:
            known = key in self._known
        except TypeError:  # an argument that cannot be looked up
            return _on_meta(func, flat, structure)
        if not known:
            self._known[key] = _on_meta(func, flat, structure)
        return self._known[key]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that the operator writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [value] if isinstance(value, Tensor) else []
    return found


def _has_tensor(flat: Sequence[Any]) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in flat)


def _any_floating(made: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_flatten(made)[0])


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _on_meta(func: Callable[..., Any], flat: Sequence[Any], structure: Any) -> Any:
    moved = [_moved(leaf) for leaf in flat]
    args, kwargs = tree_unflatten(moved, structure)
    return func(*args, **kwargs)


def _moved(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=_META)
    return _META if isinstance(leaf, torch.device) else leaf


def _stand_in(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return torch.ones((), dtype=leaf.dtype).expand(leaf.shape)
    return torch.full(leaf.shape, leaf.dtype == torch.bool, dtype=leaf.dtype)
