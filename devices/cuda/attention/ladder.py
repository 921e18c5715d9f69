"""Attention kernels for NVIDIA GPUs, best first; the first that supports a tile runs it, and the choice is logged once.

fa3          the flash-attn-3 package, if installed: fp16 and bf16 on Hopper
fa2          the flash-attn package, if installed: fp16 and bf16, head sizes to 256
flash        PyTorch's FlashAttention-2: the same
cudnn        cuDNN through PyTorch: the same up to 128, without windows, documents and ramps. `flash` takes all that it
             takes, so it runs where it is asked for by name alone, until somebody has measured which is faster
efficient    PyTorch's memory-efficient attention: also fp32, and masked tiles
math         matrix products: whatever is left (fp64, odd head sizes)

Who names rungs (TORCHSPEC_ATTENTION) gets a ladder of these alone: what they cannot run is an error.

Under `torch.use_deterministic_algorithms` each rung either repeats its gradients bit for bit or refuses (with
`warn_only` PyTorch's own kernels only warn).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiled_attention import Kernel
from torchspec.devices._tiles import Tile, TileKinds
from torchspec.devices.api import UnavailableError
from torchspec.devices.cuda.attention.cudnn import CudnnKernel
from torchspec.devices.cuda.attention.efficient import EfficientKernel
from torchspec.devices.cuda.attention.fa2 import FlashAttn2Kernel
from torchspec.devices.cuda.attention.fa3 import FlashAttn3Kernel
from torchspec.devices.cuda.attention.flash import AtenFlashKernel
from torchspec.devices.cuda.attention.varlen import Capability

log = logging.getLogger(__name__)


class Rung(Kernel, Protocol):
    name: str

    def refuses(self, q: Tensor, tile: Tile) -> str:
        """Why this kernel cannot run the tile; empty if it can. Windows and documents are a matter of `takes`."""
        ...


RUNGS: Mapping[str, Callable[[Capability], Rung]] = {
    "fa3": FlashAttn3Kernel.load,
    "fa2": FlashAttn2Kernel.load,
    "flash": AtenFlashKernel,
    "cudnn": CudnnKernel,
    "efficient": EfficientKernel,
    "math": lambda capability: MathKernel(),
}
"""By name, best first. UnavailableError with the reason where one cannot be had."""


def ladder(capability: Capability, names: Sequence[str] = ()) -> Ladder:
    """The kernels usable on a GPU of this compute capability, or those named, in this order.

    UnavailableError for a name that is unknown or cannot be had here.
    """
    unknown = [name for name in names if name not in RUNGS]
    if unknown:
        raise UnavailableError(f"no attention kernel is called {unknown[0]!r}: there are {', '.join(RUNGS)}")
    rungs: list[Rung] = []
    missing: list[str] = []
    for name in names or RUNGS:
        try:
            rungs.append(RUNGS[name](capability))
        except UnavailableError as error:
            if names:
                raise UnavailableError(f"the attention kernel {name!r}, asked for by name, {error}") from error
            missing.append(f"{name}: {error}")
    return Ladder(rungs, missing)


class Ladder:
    """`Kernel` that hands each tile to the first rung that supports it. `missing` are reasons why others are not there.

    UnavailableError with every rung's reason where none does.
    """

    def __init__(self, rungs: Sequence[Rung], missing: Sequence[str] = ()) -> None:
        self._rungs = rungs
        self._missing = missing
        self._chosen: dict[tuple[torch.dtype, int, str, bool], Rung] = {}

    def takes(self, q: Tensor) -> TileKinds:
        return self._choose(q, Tile(rows=slice(0, 1), keys=slice(0, 2))).takes(q)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        return self._choose(q, tile).forward(q, k, v, tile, scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._choose(q, tile).backward(dout, q, k, v, out, lse, tile, scale)

    def _choose(self, q: Tensor, tile: Tile) -> Rung:
        case = (q.dtype, q.shape[-1], _kind(tile), torch.are_deterministic_algorithms_enabled())
        if case not in self._chosen:
            self._chosen[case] = self._first(q, tile)
        return self._chosen[case]

    def _first(self, q: Tensor, tile: Tile) -> Rung:
        kind = _kind(tile)
        what = f"attention of {q.dtype}, head size {q.shape[-1]}{', ' if kind else ''}{kind}"
        refusals = list(self._missing)
        for rung in self._rungs:
            reason = _not_taken(rung.takes(q), tile) or rung.refuses(q, tile)
            if not reason:
                log.info("%s runs on %s%s", what, rung.name, f" ({'; '.join(refusals)})" if refusals else "")
                return rung
            refusals.append(f"{rung.name}: {reason}")
        raise UnavailableError(f"no kernel runs {what} ({'; '.join(refusals)})")


def _kind(tile: Tile) -> str:
    """What decides who runs a tile, beside dtype and head size."""
    if tile.keep_BQS is not None:
        return "masked"
    if tile.row_cuts is not None:
        return "documents"
    if tile.window is not None:
        return "windowed"
    if tile.keys.stop - tile.keys.start == 1:
        return "one key"
    ramp = tile.causal and tile.rows.stop - tile.rows.start != tile.keys.stop - tile.keys.start
    return "ramp" if ramp else ""


def _not_taken(takes: TileKinds, tile: Tile) -> str:
    if tile.window is not None and not takes.windows:
        return "no windows"
    return "no documents" if tile.row_cuts is not None and not takes.documents else ""
