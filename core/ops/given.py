"""Tensors that somebody hands over: whether there is anything in them to compute with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def no_numbers(x: object) -> str | None:
    """Why this is no tensor whose numbers can be read here, for behind a name and a colon; None: it is one."""
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}, expected a tensor"
    if isinstance(x, DTensor):
        return "a DTensor, of which each rank has a part, expected its .full_tensor() or, for a part, .to_local()"
    if x.is_meta:
        return "on the meta device, which holds no numbers"
    if x.layout is not torch.strided or x.is_nested:
        return f"{_short(x.layout)} or nested, expected a dense tensor"
    return None


def no_floats(x: object) -> str | None:
    """As `no_numbers`, where the numbers are to be floats: of 16 bits or more, since fewer go with scales."""
    if (fault := no_numbers(x)) is not None:
        return fault
    assert isinstance(x, Tensor)
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        return f"{_short(x.dtype)}, expected floats of 16 bits or more"
    return None


def _short(what: torch.dtype | torch.layout) -> str:
    return str(what).removeprefix("torch.")
