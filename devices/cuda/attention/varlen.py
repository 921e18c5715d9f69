"""What the flash kernels have in common: which tiles they run, and how packed documents reach them.

Shape letters: B batch, Q query rows, S key rows, T rows of all sequences, H heads, D head size, N documents.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchspec.devices._tiles import Tile, TileKinds
from torchspec.devices.api import UnavailableError, to_device

log = logging.getLogger(__name__)

Capability = tuple[int, int]

HALF = (torch.float16, torch.bfloat16)


class Packed(NamedTuple):
    """Documents of a flattened batch: cumulative lengths int32 [N + 1] from 0, and the longest."""

    row_cuts: Tensor
    key_cuts: Tensor
    most_rows: int
    most_keys: int

    @classmethod
    def of(cls, tile: Tile, batch: int, device: torch.device) -> Packed:
        """Each sequence's documents, one sequence after the other."""
        rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        documents = list(tile.documents())
        row_cuts = [b * rows + rows_d.start for b in range(batch) for rows_d, _ in documents] + [batch * rows]
        key_cuts = [b * keys + keys_d.start for b in range(batch) for _, keys_d in documents] + [batch * keys]
        on_q, on_k = (to_device(torch.tensor(cuts, dtype=torch.int32), device) for cuts in (row_cuts, key_cuts))
        most_rows, most_keys = (max(each.stop - each.start for each in side) for side in zip(*documents, strict=True))
        return cls(on_q, on_k, most_rows, most_keys)


class VarlenKernel(ABC):
    """A `Kernel` whose `run_forward` and `run_backward` are flash attention of q, k and v [B, rows, H, D] or, with
    `packed`, [T, H, D]; lse is [B, H, Q], or [H, T], contiguous."""

    def takes(self, q: Tensor) -> TileKinds:
        return TileKinds(windows=True, documents=True)

    @abstractmethod
    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, packed: Packed | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def run_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        packed: Packed | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        if tile.row_cuts is None:
            return self.run_forward(q, k, v, tile, None, scale)
        batch, queries = q.shape[:2]
        packed = Packed.of(tile, batch, q.device)
        q_THD, k_THD, v_THD = (x.flatten(0, 1) for x in (q, k, v))
        out_THD, lse_HT = self.run_forward(q_THD, k_THD, v_THD, tile, packed, scale)
        return out_THD.view(q.shape), lse_HT.view(-1, batch, queries).transpose(0, 1).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if tile.row_cuts is None:
            return self.run_backward(dout, q, k, v, out, lse.contiguous(), tile, None, scale)
        packed = Packed.of(tile, q.shape[0], q.device)
        lse_HT = lse.transpose(0, 1).flatten(1).contiguous()
        dout_THD, q_THD, k_THD, v_THD, out_THD = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        dq, dk, dv = self.run_backward(dout_THD, q_THD, k_THD, v_THD, out_THD, lse_HT, tile, packed, scale)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def window_sides(tile: Tile) -> tuple[int, int]:
    """Keys to the left and to the right of a row's own that it sees, as flash kernels count them; -1 is all."""
    return (-1, -1) if tile.window is None else (tile.window - 1, 0)


def half_refuses(q: Tensor, tile: Tile, largest: int) -> str:
    """What holds for every kernel on tensor cores in half precision."""
    if tile.keep_BQS is not None:
        return "no masks"
    if q.dtype not in HALF:
        return f"no {q.dtype}"
    return f"head size not a multiple of 8 up to {largest}" if q.shape[-1] % 8 or q.shape[-1] > largest else ""


def flash2_refuses(capability: Capability, q: Tensor, tile: Tile) -> str:
    """FlashAttention-2, whoever built it."""
    reason = half_refuses(q, tile, 256)
    # Shared memory of the consumer parts does not hold the backward's largest tiles (PyTorch's sdp_utils.cpp).
    if not reason and q.shape[-1] > 192 and capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        reason = f"no backward for head size {q.shape[-1]} on compute capability {capability[0]}.{capability[1]}"
    return reason


def require(capability: Capability, least: Capability) -> None:
    if capability < least:
        have, need = (".".join(map(str, each)) for each in (capability, least))
        raise UnavailableError(f"needs compute capability {need}, this GPU has {have}")


def package(name: str, wanted: Mapping[str, Sequence[str]]) -> Any:
    """The module `name`, after a look at the parameters of those of its functions that are `wanted`.

    UnavailableError if it is not there or is not that; a package that is installed and does not load is also warned of.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UnavailableError("is not installed")
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        log.warning("%s is installed but does not load: %s", name, error)
        raise UnavailableError(f"is installed but does not load: {error}") from error
    for function, parameters in wanted.items():
        lacks = set(parameters) - _parameters(getattr(module, function, None))
        if lacks:
            raise UnavailableError(f"is another version: {name}.{function} has no parameter {min(lacks)}")
    return module


def _parameters(function: Any) -> set[str]:
    """None of what is not there; a torch.library operator keeps the function that it was made of."""
    return set() if function is None else set(inspect.signature(getattr(function, "_init_fn", function)).parameters)
