"""The emulated operators do what the vendor documents, by definition, and refuse the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROWS, KEYS, HEADS, KEY_HEADS, SIZE, SCALE = 5, 7, 4, 2, 6, 0.4
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)

Seen = Callable[[int, int], bool]
"""Whether row i sees key j."""


@pytest.fixture(autouse=True)
def emulated(npu_emulation: ModuleType) -> Iterator[None]:
    with npu_emulation.installed():
        yield


def tensors(rows: int = ROWS, keys: int = KEYS, batch: tuple[int, ...] = (2,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, HEADS), (keys, KEY_HEADS), (keys, KEY_HEADS)]
    return [torch.randn(*batch, *shape, SIZE, generator=generator) for shape in shapes]


def by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out [Q, H, D], largest score and sum of exponentials [H, Q] of one sequence, pair by pair in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    largest, total = torch.zeros(2, q.shape[1], q.shape[0], dtype=torch.float64)
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            of_head = h * k.shape[1] // q.shape[1]
            keys = [j for j in range(k.shape[0]) if seen(i, j)]
            scores = [float(q[i, h].double() @ k[j, of_head].double()) * scale for j in keys]
            largest[h, i] = max(scores)
            weights = [math.exp(score - max(scores)) for score in scores]
            total[h, i] = sum(weights)
            out[i, h] = sum(w * v[j, of_head].double() for w, j in zip(weights, keys, strict=True)) / sum(weights)
    return out, largest, total


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
    given = {"head_num": HEADS, "input_layout": "BSND", **options}
    results: tuple[Any, ...] = torch.ops.npu.npu_fusion_attention(q, k, v, **given)
    return results


def whole(seen: Seen) -> Tensor:
    """[1, 1, Q, S], True where hidden."""
    return torch.tensor([[not seen(i, j) for j in range(KEYS)] for i in range(ROWS)])[None, None]


SOME: Seen = lambda i, j: (i + j) % 3 != 1  # noqa: E731
CASES: dict[str, tuple[dict[str, Any], Seen]] = {
    "no mask": ({"scale": SCALE}, lambda i, j: True),
    "no mask, whatever the mode": ({"scale": SCALE, "sparse_mode": 3}, lambda i, j: True),
    "whole mask": ({"scale": SCALE, "atten_mask": whole(SOME), "sparse_mode": 1}, SOME),
    "whole mask as bytes": ({"scale": SCALE, "atten_mask": whole(SOME).to(torch.uint8)}, SOME),
    "upper left": ({"scale": SCALE, "atten_mask": TRIANGLE, "sparse_mode": 2}, lambda i, j: j <= i),
    "lower right": ({"scale": SCALE, "atten_mask": TRIANGLE, "sparse_mode": 3}, lambda i, j: j <= i + 2),
    "band": (
        {"scale": SCALE, "atten_mask": TRIANGLE, "sparse_mode": 4, "pre_tockens": 1, "next_tockens": 0},
        lambda i, j: i + 1 <= j <= i + 2,
    ),
    "band that looks ahead": (
        {"scale": SCALE, "atten_mask": TRIANGLE, "sparse_mode": 4, "pre_tockens": 2, "next_tockens": 1},
        lambda i, j: i <= j <= i + 3,
    ),
    "band from above": (
        {"scale": SCALE, "atten_mask": whole(lambda i, j: i - 1 <= j <= i + 1), "pre_tockens": 1, "next_tockens": 1},
        lambda i, j: i - 1 <= j <= i + 1,
    ),
    "scale 1 if none is given": ({}, lambda i, j: True),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_documented_one(name: str) -> None:
    options, seen = CASES[name]
    q, k, v = tensors()
    out, largest, total, *rest = run(q, k, v, **options)
    assert [type(each) for each in rest] == [Tensor, int, int, int]
    for statistic in (largest, total):
        assert (statistic.dtype, statistic.shape) == (torch.float32, (2, HEADS, ROWS, 8))
        assert bool((statistic == statistic[..., :1]).all())
    for b in range(2):
        exact = by_definition(q[b], k[b], v[b], seen, options.get("scale", 1.0))
        for got, want in zip((out[b], largest[b, ..., 0], total[b, ..., 0]), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_a_compressed_mask_is_read_and_not_presumed() -> None:
    q, k, v = tensors()
    other = TRIANGLE.clone()
    other[0, 1] = False  # one ahead of the diagonal is shown, then
    got = run(q, k, v, scale=SCALE, atten_mask=other, sparse_mode=2)[0]
    exact = by_definition(q[0], k[0], v[0], lambda i, j: j <= i + 1, SCALE)[0]
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-6, atol=1e-6)


ENDS = {"actual_seq_qlen": [2, 2, 5], "actual_seq_kvlen": [3, 3, 7]}
IN_ORDER = {"input_layout": "TND", "softmax_layout": "TND", "scale": SCALE, **ENDS}
DOCUMENTS = (((0, 2), (0, 3)), ((2, 5), (3, 7)))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_see_themselves(causal: bool) -> None:
    q, k, v = tensors(batch=())
    mask = {"atten_mask": TRIANGLE, "sparse_mode": 3} if causal else {}
    out, largest, _, *_ = run(q, k, v, **IN_ORDER, **mask)
    heads_first = run(q, k, v, **{**IN_ORDER, "softmax_layout": ""}, **mask)[1]
    assert largest.shape == heads_first.shape == (ROWS, HEADS, 8)
    for (row, last_row), (key, last_key) in DOCUMENTS:
        ahead = (last_key - key) - (last_row - row)
        seen: Seen = lambda i, j, ahead=ahead: not causal or j <= i + ahead  # noqa: E731
        exact, exact_largest, _ = by_definition(q[row:last_row], k[key:last_key], v[key:last_key], seen, SCALE)
        torch.testing.assert_close(out[row:last_row].double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(largest[row:last_row, :, 0].double(), exact_largest.T, rtol=1e-6, atol=1e-6)
        stored = heads_first[row:last_row, :, 0].reshape(HEADS, -1)
        torch.testing.assert_close(stored.double(), exact_largest, rtol=1e-6, atol=1e-6)


def loss(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, mask: Tensor) -> Tensor:
    repeated_k, repeated_v = (x.repeat_interleave(HEADS // KEY_HEADS, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bshd->bhqs", q, repeated_k) * SCALE
    weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
    return (torch.einsum("bhqs,bshd->bqhd", weights, repeated_v) * dy).sum()


def test_the_gradient_is_that_of_the_definition_and_scales_with_softmax_sum() -> None:
    q, k, v = tensors()
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    mask = whole(SOME)
    out, largest, total, *_ = run(q, k, v, scale=SCALE, atten_mask=mask, sparse_mode=1)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(loss(*wide, dy.double(), mask), wide)
    options = {"atten_mask": mask, "sparse_mode": 1, "attention_in": out, "scale_value": SCALE}
    lse = largest + total.log()
    for statistics in ((largest, total), (lse, torch.ones_like(lse))):
        named = dict(zip(("softmax_max", "softmax_sum"), statistics, strict=True))
        grads = torch.ops.npu.npu_fusion_attention_grad(q, k, v, dy, HEADS, "BSND", **named, **options)
        assert len(grads) == 5
        for got, want in zip(grads[:3], exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    named["softmax_sum"] = 2 * named["softmax_sum"]
    halved = torch.ops.npu.npu_fusion_attention_grad(q, k, v, dy, HEADS, "BSND", **named, **options)[2]
    torch.testing.assert_close(halved, grads[2] / 2)


def attend(**options: Any) -> None:
    run(*tensors(), **options)


def attend_packed(**options: Any) -> None:
    run(*tensors(batch=()), **{**IN_ORDER, **options})


def zeros(rows: int, heads: int, size: int, key_heads: int | None = None) -> list[Tensor]:
    return [torch.zeros(1, rows, heads, size), *[torch.zeros(1, rows, key_heads or heads, size)] * 2]


EMPTY = whole(lambda i, j: i != 2)
REFUSED: dict[str, Callable[[], Any]] = {
    "float64": lambda: run(*(x.double() for x in tensors())),
    "mixed dtypes": lambda: run(tensors()[0].bfloat16(), *tensors()[1:]),
    "strides": lambda: run(tensors()[0].mT.contiguous().mT, *tensors()[1:]),
    "head size": lambda: run(*zeros(1, 1, 769), head_num=1),
    "too many heads": lambda: run(*zeros(1, 257, 1), head_num=257),
    "heads that do not divide": lambda: run(*zeros(2, 3, 4, key_heads=2), head_num=3),
    "head_num of key heads": lambda: attend(head_num=KEY_HEADS),
    "mask of too few dimensions": lambda: attend(atten_mask=whole(SOME)[0, 0], sparse_mode=1),
    "mask of three dimensions": lambda: attend(atten_mask=whole(SOME)[0], sparse_mode=1),
    "mask that broadcasts over rows": lambda: attend(atten_mask=whole(SOME)[:, :, :1].contiguous(), sparse_mode=1),
    "mask of floats": lambda: attend(atten_mask=whole(SOME).float(), sparse_mode=1),
    "whole mask for a compressed one": lambda: attend(atten_mask=whole(SOME), sparse_mode=3),
    "small compressed mask": lambda: attend(atten_mask=TRIANGLE[:5, :7].contiguous(), sparse_mode=2),
    "prefix mode": lambda: attend(atten_mask=TRIANGLE, sparse_mode=6),
    "mask beyond the band": lambda: attend(atten_mask=whole(SOME), pre_tockens=0, next_tockens=0),
    "row without keys": lambda: attend(atten_mask=EMPTY, sparse_mode=1),
    "reserved precision": lambda: attend(inner_precise=1),
    "dropout": lambda: attend(keep_prob=0.9),
    "bias": lambda: attend(pse=torch.zeros(2, HEADS, ROWS, KEYS)),
    "sink": lambda: attend(sink=torch.zeros(HEADS)),
    "layout": lambda: attend(input_layout="SBH"),
    "lengths without documents": lambda: attend(**ENDS),
    "leading zero": lambda: attend_packed(actual_seq_qlen=[0, 2, 5], actual_seq_kvlen=[0, 3]),
    "rows left over": lambda: attend_packed(actual_seq_qlen=[2, 4], actual_seq_kvlen=[3, 7]),
    "lengths instead of ends": lambda: attend_packed(actual_seq_qlen=[3, 2], actual_seq_kvlen=[4, 3]),
    "more rows than keys": lambda: attend_packed(
        actual_seq_qlen=[4, 5], actual_seq_kvlen=[3, 7], atten_mask=TRIANGLE, sparse_mode=3
    ),
    "whole mask of documents": lambda: attend_packed(atten_mask=whole(SOME), sparse_mode=1),
    "too many documents": lambda: attend_packed(
        actual_seq_qlen=[*[0] * 1024, 5], actual_seq_kvlen=[*[0] * 1024, 7]
    ),
    "gamma of another dtype": lambda: torch.ops.npu.npu_rms_norm(torch.zeros(2, 4).bfloat16(), torch.ones(4)),
    "norm of float64": lambda: torch.ops.npu.npu_rms_norm(torch.zeros(2, 4).double(), torch.ones(4).double()),
    "rotation of three dimensions": lambda: torch.ops.npu.npu_rotary_mul(*[torch.zeros(2, 3, 4)] * 3),
    "interleaved rotation": lambda: torch.ops.npu.npu_rotary_mul(*[torch.zeros(1, 2, 1, 4)] * 3, "interleave"),
    "odd rotation": lambda: torch.ops.npu.npu_rotary_mul(*[torch.zeros(1, 2, 1, 3)] * 3),
    "cosines of another dtype": lambda: torch.ops.npu.npu_rotary_mul(
        torch.zeros(1, 2, 1, 4).half(), *[torch.zeros(1, 2, 1, 4)] * 2
    ),
    "odd gate": lambda: torch.ops.npu.npu_swiglu(torch.zeros(2, 5)),
    "gate of float64": lambda: torch.ops.npu.npu_swiglu(torch.zeros(2, 4).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_is_not_documented(name: str) -> None:
    with pytest.raises(ValueError, match="the emulated operator refuses"):
        REFUSED[name]()


@pytest.mark.parametrize("wrong", ["softmax_max", "softmax_sum", "attention_in", "copies"])
def test_its_gradient_refuses_what_does_not_fit(wrong: str) -> None:
    q, k, v = tensors()
    out, largest, total, *_ = run(q, k, v)
    given = {"softmax_max": largest, "softmax_sum": total, "attention_in": out}
    if wrong == "copies":
        given["softmax_max"] = largest + torch.arange(8)
    elif wrong == "attention_in":
        given[wrong] = out.bfloat16()
    else:
        given[wrong] = given[wrong][..., :1].contiguous()
    with pytest.raises(ValueError, match="the emulated operator refuses"):
        torch.ops.npu.npu_fusion_attention_grad(q, k, v, out, HEADS, "BSND", **given)
