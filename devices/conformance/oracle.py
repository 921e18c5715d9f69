"""Attention by its definition, on the host in float64; and masks, each given twice: as the contract's description and
as the keys that a row keeps, worked out one by one from the words of `MaskSpec`.

Shape letters: B batch, Q query rows, S key rows, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchspec.devices.api import MaskSpec

BATCH = 2
SCALE = 0.07
"""Neither 1 nor one over the root of any head size here: an adapter that leaves the scale out is seen."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Attention of given shapes under a mask by name."""

    mask: str
    queries: int
    keys: int
    heads: tuple[int, int] = (2, 2)
    size: int = 64
    dtype: torch.dtype = torch.float32
    scale: float = SCALE

    def __str__(self) -> str:
        heads = f"{self.heads[0]}/{self.heads[1]} heads of {self.size}"
        return f"{self.mask}, {self.queries} x {self.keys}, {heads}, {str(self.dtype).removeprefix('torch.')}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout on the host, rounded to the dtype."""
        made = torch.Generator().manual_seed(1000 * self.queries + self.keys)
        rows_heads = zip((self.queries, self.keys, self.keys, self.queries), (0, 1, 1, 0), strict=True)
        shapes = [(BATCH, rows, self.heads[which], self.size) for rows, which in rows_heads]
        q, k, v, dout = (torch.randn(shape, generator=made, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return q, k, v, dout


@dataclass(frozen=True, kw_only=True)
class Exact:
    """All float64 on the host; `empty_BHQ`: rows without keys, whose lse is left out of comparisons."""

    out_BQHD: Tensor
    lse_BHQ: Tensor
    empty_BHQ: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


def attention(
    q_BQHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, dout_BQHD: Tensor, keep_BQS: Tensor, scale: float
) -> Exact:
    """Query head h looks at key head h // (H / K); softmax over the kept keys, natural logarithms."""
    q, k, v = (x.to(torch.float64).requires_grad_() for x in (q_BQHD, k_BSKD, v_BSKD))
    group = q.shape[2] // max(1, k.shape[2])
    scores_BHQS = torch.einsum("bqhd,bshd->bhqs", q, k.repeat_interleave(group, dim=2)) * scale
    kept_BHQS = keep_BQS[:, None].expand_as(scores_BHQS)
    empty_BHQ = ~kept_BHQS.any(-1)
    hidden = scores_BHQS.masked_fill(~kept_BHQS, -torch.inf)
    weights = hidden.masked_fill(empty_BHQ[..., None], 0.0).softmax(-1).masked_fill(empty_BHQ[..., None], 0.0)
    out = torch.einsum("bhqs,bshd->bqhd", weights, v.repeat_interleave(group, dim=2))
    grads = torch.autograd.grad(out, (q, k, v), dout_BQHD.to(torch.float64), allow_unused=True, materialize_grads=True)
    lse = hidden.detach().logsumexp(-1) if hidden.shape[-1] else hidden.detach().sum(-1).fill_(-torch.inf)
    return Exact(out_BQHD=out.detach(), lse_BHQ=lse, empty_BHQ=empty_BHQ, grads=grads)  # type: ignore[arg-type]


@cache
def solved(case: Case) -> Exact:
    return attention(*case.tensors(), masked(case)[1], case.scale)


@cache
def masked(case: Case) -> tuple[MaskSpec, Tensor]:
    """(the mask as adapters get it, keep [B, Q, S] by its definition)."""
    name, _, option = case.mask.partition(":")
    return _MASKS[name](case, option)


def _by_definition(case: Case, keeps: Callable[[int, int, int], bool]) -> Tensor:
    rows = [[[keeps(b, i, j) for j in range(case.keys)] for i in range(case.queries)] for b in range(BATCH)]
    return torch.tensor(rows, dtype=torch.bool).view(BATCH, case.queries, case.keys)


def _offset(case: Case, alignment: str) -> int:
    return case.keys - case.queries if alignment == "lower_right" else 0


def _full(case: Case, option: str) -> tuple[MaskSpec, Tensor]:
    return MaskSpec.full(), _by_definition(case, lambda b, i, j: True)


def _causal(case: Case, alignment: str) -> tuple[MaskSpec, Tensor]:
    offset = _offset(case, alignment)
    return MaskSpec.causal(alignment), _by_definition(case, lambda b, i, j: j <= i + offset)  # type: ignore[arg-type]


def _window(case: Case, option: str) -> tuple[MaskSpec, Tensor]:
    width, alignment = int(option.split(",")[0]), option.split(",")[1]
    offset = _offset(case, alignment)
    keep_BQS = _by_definition(case, lambda b, i, j: i + offset - width < j <= i + offset)
    return MaskSpec.sliding(width, alignment), keep_BQS  # type: ignore[arg-type]


def _dense(case: Case, option: str) -> tuple[MaskSpec, Tensor]:
    """Half the keys at random; "empty": one row of the first sequence keeps none."""
    batch = 1 if option == "shared" else BATCH
    made = torch.Generator().manual_seed(7)
    keep_BQS = torch.rand(batch, case.queries, case.keys, generator=made) < 0.5
    keep_BQS[..., :1] = True
    if option == "empty":
        keep_BQS[0, case.queries // 2] = False
    return MaskSpec.dense(keep_BQS), keep_BQS.expand(BATCH, -1, -1)


def _limits(case: Case, option: str) -> tuple[MaskSpec, Tensor]:
    queries, keys = case.queries, case.keys
    if option == "nonzero empty":  # every third row's interval is empty, and not at 0
        start = [[min(keys, i) for i in range(queries)]]
        end = [[min(keys, i + (0 if i % 3 == 2 else 4)) for i in range(queries)]]
    elif option == "padded":  # the second sequence is shorter; its last rows see what its last real one sees
        start = [[0] * queries] * BATCH
        end = [[min(i + 1, length) for i in range(queries)] for length in (keys, max(1, keys * 2 // 3))]
    elif option in (
        "packed",
        "packed int32",
        "packed on device",
    ):  # causal within documents, long and short, the same in every sequence
        cuts = [0, 1, 4, queries // 3, queries // 2, queries // 2 + 2]
        start = [[max(cut for cut in cuts if cut <= i) for i in range(queries)]]
        end = [[min(keys, i + 1) for i in range(queries)]]
    elif option == "blocks":  # some rows each against a prefix of their own
        start = [[0] * queries, [min(2, keys)] * queries]
        end = [[min(keys, 5 + 9 * (i // 7)) for i in range(queries)]] * BATCH
    else:  # "late": the first rows keep nothing
        start = [[0] * queries]
        end = [[min(keys, max(0, i - 39)) for i in range(queries)]]
    dtype = torch.int32 if option.endswith("int32") else torch.int64
    mask = MaskSpec.limits(torch.tensor(start, dtype=dtype), torch.tensor(end, dtype=dtype))
    keep_BQS = _by_definition(case, lambda b, i, j: start[b % len(start)][i] <= j < end[b % len(end)][i])
    return mask, keep_BQS


_MASKS = {"full": _full, "causal": _causal, "window": _window, "dense": _dense, "limits": _limits}
