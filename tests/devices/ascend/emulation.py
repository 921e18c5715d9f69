"""torch_npu's operators on the CPU, under the schemas of a published wheel, as the vendor documents them.

What the documentation does not say, or forbids, is refused; so is what the adapter has no need of. Values are computed
in float64 and rounded once: this checks calls and semantics, not the rounding of a kernel.

Shape letters: B batch, Q query rows, S key rows, T rows of all documents, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RECORDED = Path(__file__).with_name("recorded")
VERSIONS = tuple(sorted(path.stem for path in RECORDED.glob("*.json")))

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COMPRESSED = 2048
UNBOUNDED = 2147483647
MILLION, MOST_DOCUMENTS = 1 << 20, 1 << 10


def recorded(version: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((RECORDED / f"{version}.json").read_text())
    return facts


@contextmanager
def installed(version: str = VERSIONS[-1]) -> Iterator[None]:
    """`torch.ops.npu` as of this torch_npu, for tensors on the CPU."""
    library = torch.library.Library("npu", "DEF")
    for text in recorded(version)["operators"]:
        schema = torch._C.parse_schema(f"npu::{text}")
        library.define(text)
        name = schema.name.partition("::")[2]
        library.impl(name, _with_names(schema, globals()[name]), "CPU")
    try:
        yield
    finally:
        library._destroy()


def _with_names(schema: Any, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function` of one object that has every argument by its name in the schema."""
    defaults = {each.name: each.default_value for each in schema.arguments}

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(SimpleNamespace(**defaults | dict(zip(defaults, args, strict=False)) | kwargs))

    return call


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"the emulated operator refuses: {what}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row of a batch, or one document: q [H, Q, D], k and v [K, S, D] in float64, which keys each row sees."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    rows: tuple[Any, ...]
    keys: tuple[Any, ...]

    def scores(self, scale: float) -> Tensor:
        """[H, Q, S]."""
        return (self.q @ _repeated(self.k, self.q).mT * scale).masked_fill(~self.seen, -torch.inf)


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(len(q) // len(k), 0)


def npu_fusion_attention(given: Any) -> tuple[Any, ...]:
    parts = _parts(given)
    _check(given.dropout_mask is None and given.seed == given.offset == 0, "dropout")
    out = torch.full_like(given.query, torch.nan)
    statistics = given.query.new_full((2, *_rows_shape(given)), torch.nan, dtype=torch.float32)
    for part in parts:
        scores = part.scores(given.scale)
        largest = scores.amax(-1)
        weights = (scores - largest[..., None]).exp()
        total = weights.sum(-1)
        empty = ~part.seen.any(-1)
        result = weights @ _repeated(part.v, part.q) / total[..., None]
        # What rows without keys hold is not documented.
        out[part.rows] = result.masked_fill(empty[..., None], torch.nan).transpose(0, 1).to(out.dtype)
        for which, value in enumerate((largest, total)):
            _write(given, statistics[which], part, value.masked_fill(empty, torch.nan).float())
    copies = statistics[..., None].expand(*statistics.shape, 8).contiguous()
    return out, copies[0], copies[1], given.query.new_empty(0), 0, 0, 0


def npu_fusion_attention_grad(given: Any) -> tuple[Tensor, ...]:
    parts = _parts(given)
    _check(given.softmax_in is None and given.seed == given.offset == given.numels == 0, "dropout")
    for name in ("dy", "attention_in"):
        value = getattr(given, name)
        _check(value is not None and value.shape == given.query.shape, f"{name} of another shape than query")
        _check(value.dtype == given.query.dtype and value.is_contiguous(), f"{name}: dtype or strides")
    for name in ("softmax_max", "softmax_sum"):
        value = getattr(given, name)
        _check(value is not None and value.dtype == torch.float32, f"{name} is not fp32")
        _check(value.shape == (*_rows_shape(given), 8) and value.is_contiguous(), f"{name}: shape or strides")
        _check(bool((value == value[..., :1]).all()), f"{name}: eight different copies")
    grads = [torch.zeros(x.shape, dtype=torch.float64) for x in (given.query, given.key, given.value)]
    for part in parts:
        dy, out = (x[part.rows].double().transpose(0, 1) for x in (given.dy, given.attention_in))
        largest, total = (_read(given, x[..., 0], part).double() for x in (given.softmax_max, given.softmax_sum))
        weights = (part.scores(given.scale_value) - largest[..., None]).exp() / total[..., None]
        dscores = weights * (dy @ _repeated(part.v, part.q).mT - (dy * out).sum(-1, keepdim=True))
        dk, dv = dscores.mT @ part.q * given.scale_value, weights.mT @ dy
        grads[0][part.rows] = (dscores @ _repeated(part.k, part.q) * given.scale_value).transpose(0, 1)
        for grad, of_heads in zip(grads[1:], (dk, dv), strict=True):
            grad[part.keys] = of_heads.unflatten(0, (len(part.k), -1)).sum(1).transpose(0, 1)
    return (*(grad.to(given.query.dtype) for grad in grads), given.query.new_empty(0), given.query.new_empty(0))


def _rows_shape(given: Any) -> tuple[int, ...]:
    """Of the statistics without their copies: [B, H, Q], or [T, H] by its label."""
    if given.input_layout == "TND":
        return tuple(given.query.shape[:2])
    batch, rows, heads, _ = given.query.shape
    return batch, heads, rows


def _write(given: Any, statistic: Tensor, part: Part, value_HQ: Tensor) -> None:
    if given.input_layout != "TND":
        statistic[part.rows[0]] = value_HQ
    elif given.softmax_layout == "TND":
        statistic[part.rows] = value_HQ.T
    else:  # heads first within each document, whatever the shape says
        statistic[part.rows] = value_HQ.reshape(-1).view_as(statistic[part.rows])


def _read(given: Any, statistic: Tensor, part: Part) -> Tensor:
    if given.input_layout != "TND":
        return statistic[part.rows[0]]
    rows = statistic[part.rows]
    return rows.T if given.softmax_layout == "TND" else rows.reshape(-1).view(rows.shape[1], rows.shape[0])


def _parts(given: Any) -> list[Part]:
    _check_attention(given)
    if given.input_layout == "TND":
        row_ends, key_ends = given.actual_seq_qlen, given.actual_seq_kvlen
        places = [
            ((slice(*rows),), (slice(*keys),), None)
            for rows, keys in zip(pairwise([0, *row_ends]), pairwise([0, *key_ends]), strict=True)
            if rows[1] > rows[0]
        ]
    else:
        places = [((b,), (b,), b) for b in range(len(given.query))]
    parts = []
    for rows, keys, batch in places:
        q, k, v = given.query[rows], given.key[keys], given.value[keys]
        seen = _seen(given, q.shape[0], k.shape[0], batch)
        empty = not bool(seen.any(-1).all())
        _check(not (empty and batch is None), "rows without keys in packed documents")
        found_out = given.sparse_mode == 3 and q.shape[0] > k.shape[0]
        _check(not empty or found_out or given.inner_precise == 2, "rows without keys without inner_precise=2")
        q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
        parts.append(Part(q=q, k=k, v=v, seen=seen if seen.dim() == 3 else seen[None], rows=rows, keys=keys))
    return parts


def _check_attention(given: Any) -> None:
    q, k, v = given.query, given.key, given.value
    packed = given.input_layout == "TND"
    _check(given.input_layout in ("BSND", "TND"), f"layout {given.input_layout}")
    _check(q.dtype in DTYPES and q.dtype == k.dtype == v.dtype, f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    _check(all(x.is_contiguous() and x.dim() == (3 if packed else 4) for x in (q, k, v)), "strides or dimensions")
    _check(k.shape == v.shape and q.shape[-1] == k.shape[-1], "key and value of different shapes")
    _check(1 <= q.shape[-1] <= 768, f"head size {q.shape[-1]}")
    heads, key_heads = q.shape[-2], k.shape[-2]
    _check(given.head_num == heads <= 256, f"{given.head_num} heads of {heads}")
    _check(heads % key_heads == 0, f"{heads} heads over {key_heads}")
    _check(1 <= q.shape[-3] <= MILLION and 1 <= k.shape[-3] <= MILLION, "lengths")
    unused = (given.pse, given.padding_mask, given.prefix, given.sink)
    _check(all(x is None for x in unused) and given.keep_prob == 1, "pse, padding, prefix, sink or dropout")
    _check(given.inner_precise in (0, 2), "a reserved inner_precise")
    ends = (given.actual_seq_qlen, given.actual_seq_kvlen)
    if not packed:
        _check(ends == (None, None) and given.softmax_layout == "", "lengths of documents without TND")
        _check(q.shape[0] == k.shape[0] >= 1, "batches of different sizes")
        return
    _check(given.softmax_layout in ("", "TND"), f"softmax_layout {given.softmax_layout}")
    _check(None not in ends and len(ends[0]) == len(ends[1]) <= MOST_DOCUMENTS, "numbers of documents")
    for each, whole in zip(ends, (len(q), len(k)), strict=True):
        _check(each[-1] == whole and sorted(each) == list(each), "ends that are not cumulative, or leave rows over")


def _seen(given: Any, rows: int, keys: int, batch: int | None) -> Tensor:
    """bool [Q, S], or [H, Q, S] of a mask that differs between heads."""
    mask, mode = given.atten_mask, given.sparse_mode
    if mask is None:  # the mode is then ignored, too
        return torch.ones(rows, keys, dtype=torch.bool)
    _check(mask.dtype in (torch.bool, torch.uint8) and mask.is_contiguous(), f"a mask of {mask.dtype}")
    ahead = torch.arange(keys) - torch.arange(rows)[:, None]  # of the diagonal from the upper left corner
    if mode in (0, 1):
        _check(batch is not None, "whole masks of packed documents")
        batches, heads = len(given.query), given.query.shape[2]
        fits = mask.dim() == 4 and mask.shape[0] in (1, batches) and mask.shape[1] in (1, heads)
        _check(fits and tuple(mask.shape[2:]) == (rows, keys), f"a mask of shape {list(mask.shape)}")
        hidden = mask.bool()[batch if len(mask) > 1 else 0]
        if mode == 0:
            outside = (ahead > given.next_tockens) | (ahead < -given.pre_tockens)
            _check(bool((hidden | ~outside).all()), "a mask that shows what pre_tockens and next_tockens cut off")
        return ~hidden
    _check(mode in (2, 3, 4), f"sparse_mode {mode}")
    _check(tuple(mask.shape) == (COMPRESSED, COMPRESSED), f"a compressed mask of shape {list(mask.shape)}")
    if mode == 2:
        return ~_compressed(mask, ahead)
    ahead = ahead - (keys - rows)
    if mode == 3:
        return ~_compressed(mask, ahead)
    _check(given.pre_tockens + given.next_tockens >= 0, "a band without pairs")
    return ~_compressed(mask, ahead - given.next_tockens) & (ahead >= -given.pre_tockens)


def _compressed(mask: Tensor, ahead: Tensor) -> Tensor:
    """Whether pairs so far ahead of the diagonal are hidden, as the mask's own cells at that distance say."""
    near = ahead.clamp(-COMPRESSED + 1, COMPRESSED - 1)
    return mask.bool()[(-near).clamp(min=0), near.clamp(min=0)]


def npu_rms_norm(given: Any) -> tuple[Tensor, Tensor]:
    x, inverse = _normed(given, (2, 8))
    return (x * inverse * given.gamma.double()).to(given.self.dtype), inverse.float()


def npu_rms_norm_backward(given: Any) -> tuple[Tensor, Tensor]:
    _normed(SimpleNamespace(self=given.self, gamma=given.gamma, epsilon=0.0), (2, 8))
    _check(given.dy.dtype == given.self.dtype and given.dy.shape == given.self.shape, "dy of another dtype or shape")
    _check(given.rstd.dtype == torch.float32 and given.rstd.shape == (*given.self.shape[:-1], 1), "rstd")
    _check(given.dy.is_contiguous() and given.rstd.is_contiguous(), "strides")
    unit, dy = given.self.double() * given.rstd.double(), given.dy.double()
    grad = dy * given.gamma.double()
    dx = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * given.rstd.double()
    return dx.to(given.self.dtype), (dy * unit).flatten(0, -2).sum(0).float()


def _normed(given: Any, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x in float64 and the inverse of its root mean square."""
    _check(given.self.dtype in DTYPES and given.gamma.dtype == given.self.dtype, "gamma of another dtype than x")
    _check(dims[0] <= given.self.dim() <= dims[1] and given.gamma.shape == given.self.shape[-1:], "dimensions")
    _check(given.self.is_contiguous() and given.gamma.is_contiguous(), "strides")
    x = given.self.double()
    return x, ((x * x).mean(-1, keepdim=True) + given.epsilon).rsqrt()


def npu_rotary_mul(given: Any) -> Tensor:
    x, cos, sin = given.self, given.r1, given.r2
    _check(given.rotary_mode == "half" and given.rotate is None, "another mode than half")
    _check(x.dim() == 4 and x.dtype in DTYPES and x.is_contiguous(), "x: dtype, strides or dimensions")
    batch, rows, heads, size = x.shape
    _check(size % 2 == 0 and size < 896 and max(batch, heads) < 1000, f"shape {list(x.shape)}")
    for each in (cos, sin):
        _check(each.dtype == x.dtype and each.is_contiguous(), "cos or sin: dtype or strides")
        _check(each.shape in ((1, rows, 1, size), (batch, rows, 1, size), x.shape), f"cos {list(each.shape)}")
    first, second = x.double().chunk(2, -1)
    return (x.double() * cos.double() + torch.cat((-second, first), -1) * sin.double()).to(x.dtype)


def npu_swiglu(given: Any) -> Tensor:
    gate, up = _halves(given)
    return (F.silu(gate) * up).to(given.self.dtype)


def npu_swiglu_backward(given: Any) -> Tensor:
    gate, up = _halves(given)
    _check(given.grad_output.dtype == given.self.dtype and given.grad_output.shape == gate.shape, "the gradient")
    _check(given.grad_output.is_contiguous(), "strides")
    dout, share = given.grad_output.double(), gate.sigmoid()
    dgate = dout * up * share * (1 + gate * (1 - share))
    return torch.cat((dgate, dout * gate * share), -1).to(given.self.dtype)


def _halves(given: Any) -> tuple[Tensor, Tensor]:
    _check(given.dim == -1, "another axis than the last")
    _check(given.self.dtype in DTYPES and given.self.is_contiguous(), "dtype or strides")
    _check(1 <= given.self.dim() <= 8 and given.self.shape[-1] % 2 == 0, "dimensions")
    gate, up = given.self.double().chunk(2, -1)
    return gate, up
