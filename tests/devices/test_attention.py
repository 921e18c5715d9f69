"""Every attention implementation against attention by its definition: outputs, log-sum-exps and all gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.lse import merge

BATCH = 2
SCALE = 0.37

# ||got - exact|| / ||exact||. fp64 rounds at 1e-16 a term; fp32 at 6e-8; bf16 inputs are exact in the oracle, but
# outputs, probabilities and score gradients are each rounded to 8 bits (4e-3) inside the kernels.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

Visible = Callable[[int, int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mask by name and the shapes of two sequences under it; hashable, so that each is solved once."""

    mask: str
    queries: int
    keys: int
    heads: tuple[int, int] = (1, 1)
    dtype: torch.dtype = torch.float64
    size: int = 4

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.queries * 1000 + self.keys)
        rows_heads = [(self.queries, 0), (self.keys, 1), (self.keys, 1), (self.queries, 0)]
        shapes = [(BATCH, rows, self.heads[which], self.size) for rows, which in rows_heads]
        q, k, v, dout = (torch.randn(s, dtype=torch.float64, generator=generator).to(self.dtype) for s in shapes)
        return q, k, v, dout

    def spec(self) -> tuple[MaskSpec, Visible]:
        """The mask, and the keys of row i of sequence b from the definition in `MaskSpec`'s docstring."""
        kind, _, option = self.mask.partition(":")
        if kind == "full":
            return MaskSpec.full(), lambda b, i: list(range(self.keys))
        if kind == "causal":
            offset = self._offset(option)
            return MaskSpec.causal(option), lambda b, i: [j for j in range(self.keys) if j <= i + offset]
        if kind == "window":
            width, alignment = int(option.split(",")[0]), option.split(",")[1]
            offset = self._offset(alignment)
            return MaskSpec.sliding(width, alignment), lambda b, i: [
                j for j in range(self.keys) if i + offset - width < j <= i + offset
            ]
        if kind == "dense":
            generator = torch.Generator().manual_seed(7)
            keep = torch.rand(1 if option == "shared" else BATCH, self.queries, self.keys, generator=generator) < 0.4
            keep[:, 0] = True
            keep[0, self.queries // 2] = False  # a row without keys
            rows = keep.tolist()
            return MaskSpec.dense(keep), lambda b, i: [j for j, kept in enumerate(rows[b % len(rows)][i]) if kept]
        return self._limits(option)

    def _offset(self, alignment: str) -> int:
        return self.keys - self.queries if alignment == "lower_right" else 0

    def _limits(self, option: str) -> tuple[MaskSpec, Visible]:
        queries, keys = self.queries, self.keys
        start = [[0] * queries]
        if option == "random":  # any intervals, some empty
            generator = torch.Generator().manual_seed(7)
            start = torch.randint(0, keys, (BATCH, queries), generator=generator).tolist()
            end = [[min(keys, s + (s * 7 + i) % 5) for i, s in enumerate(row)] for row in start]
        elif option == "padding":  # causal; each sequence ends early, and its last rows see what the last real one sees
            end = [[min(i + 1, n) for i in range(queries)] for n in (keys, max(1, keys * 2 // 3))]
        elif option.startswith("packed"):  # causal within documents of several lengths, for each sequence its own
            firsts = [(1, 3, queries // 5, queries // 2), (2, queries // 3, queries - 1)]
            each = [
                [0, *{min(keys - 1, c) for c in cuts}] for cuts in firsts[: BATCH if option == "packed_each" else 1]
            ]
            start = [[max(c for c in cuts if c <= i) for i in range(queries)] for cuts in each]
            end = [[min(keys, i + 1) for i in range(queries)]]
        elif option == "whole":  # documents that see all of themselves; the last has the rest of the keys
            ends = [*sorted({min(queries, c) for c in (2, queries // 3, queries // 3 + 1)} - {0}), queries]
            last = [min(keys, c) for c in ends[:-1]] + [keys]
            of = [next(d for d, c in enumerate(ends) if i < c) for i in range(queries)]
            start, end = [[0 if d == 0 else last[d - 1] for d in of]], [[last[d] for d in of]]
        elif option == "blocks":  # 16 rows see the same keys; a long stretch of them is seen by many of these
            block = [i // 16 for i in range(queries)]
            start = [[3 * a for a in block], [0] * queries]
            end = [[min(keys, 600 + 7 * a) for a in block]]
        else:  # a ramp whose interval opens only after some rows, then a constant stretch
            start = [[min(3, keys)] * queries]
            end = [[max(0, min(i - min(40, queries // 2), keys - 1)) for i in range(queries)]]
        mask = MaskSpec.limits(torch.tensor(start), torch.tensor(end))
        return mask, lambda b, i: list(range(start[b % len(start)][i], end[b % len(end)][i]))


@dataclass(frozen=True, kw_only=True)
class Solution:
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]


def brute_force(tensors: tuple[Tensor, ...], visible: Visible) -> Solution:
    """One query row and head at a time over an explicit list of keys, in float64."""
    q, k, v = (x.double().requires_grad_() for x in tensors[:3])
    batch, queries, heads, _ = q.shape
    group = heads // k.shape[2]
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    outs = []
    for b in range(batch):
        for i in range(queries):
            keys = visible(b, i)
            for h in range(heads):
                scores = (k[b, keys, h // group] @ q[b, i, h] * SCALE).exp()
                total = scores.sum()
                outs.append(scores @ v[b, keys, h // group] / total if keys else q[b, i, h] * 0)
                lse[b, h, i] = total.detach().log()
    out = torch.stack(outs).view(q.shape)
    grads = torch.autograd.grad(out, (q, k, v), tensors[3].double(), allow_unused=True, materialize_grads=True)
    return Solution(out=out.detach(), lse=lse, grads=grads)


@functools.cache
def solve(problem: Problem) -> Solution:
    return brute_force(problem.tensors(), problem.spec()[1])


def distance(got: Tensor, exact: Tensor) -> float:
    got = got.detach().cpu().double()
    assert got.shape == exact.shape
    return float((got - exact).norm() / exact.norm().clamp(min=1.0))  # gradients that cancel have norm 0


def on(device: torch.device, mask: MaskSpec) -> MaskSpec:
    tensors = (mask.key_start_BQ, mask.key_end_BQ, mask.keep_BQS)
    start, end, keep = (None if x is None else x.to(device) for x in tensors)
    return MaskSpec(
        kind=mask.kind,
        alignment=mask.alignment,
        window=mask.window,
        key_start_BQ=start,
        key_end_BQ=end,
        keep_BQS=keep,
    )


def check(subject, mask: MaskSpec, tensors: tuple[Tensor, ...], exact: Solution) -> None:
    mask = on(subject.device, mask)
    q, k, v, dout = (x.to(subject.device) for x in tensors)
    tolerance = TOLERANCE[q.dtype]
    out, lse = subject.attention.forward(q, k, v, mask, SCALE)
    grads = subject.attention.backward(dout, q, k, v, out, lse, mask, SCALE)

    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert lse.is_contiguous()
    assert [g.dtype for g in grads] == [q.dtype] * 3
    empty = exact.lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, empty)
    assert distance(lse.cpu().masked_fill(empty, 0.0), exact.lse.masked_fill(empty, 0.0)) <= tolerance
    assert distance(out, exact.out) <= tolerance
    assert not out.cpu()[empty.transpose(1, 2)].any()
    for name, got, want in zip(("dq", "dk", "dv"), grads, exact.grads, strict=True):
        assert distance(got, want) <= tolerance, name


MASKS = [
    "full",
    "causal:upper_left",
    "causal:lower_right",
    "window:1,upper_left",
    "window:3,lower_right",
    "window:1000,lower_right",
    "limits:random",
    "limits:padding",
    "limits:packed",
    "limits:packed_each",
    "limits:whole",
    "limits:late",
    "dense:shared",
    "dense:each",
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (6, 11), (11, 6)])
def test_small_masks_with_grouped_heads(subject, mask: str, queries: int, keys: int) -> None:
    problem = Problem(mask=mask, queries=queries, keys=keys, heads=(4, 2))
    check(subject, problem.spec()[0], problem.tensors(), solve(problem))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (270, 330), (330, 270)])
def test_masks_beyond_one_block_of_rows(subject, mask: str, queries: int, keys: int) -> None:
    problem = Problem(mask=mask, queries=queries, keys=keys)
    check(subject, problem.spec()[0], problem.tensors(), solve(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal:lower_right", "limits:random", "limits:packed", "dense:each"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_lower_precisions(subject, dtype: torch.dtype, mask: str, heads: tuple[int, int]) -> None:
    problem = Problem(mask=mask, queries=13, keys=21, heads=heads, dtype=dtype, size=16)
    check(subject, problem.spec()[0], problem.tensors(), solve(problem))


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        *((torch.float32, mask) for mask in ("causal:lower_right", "window:3,lower_right", "limits:packed")),
        *((torch.bfloat16, mask) for mask in ("causal:lower_right", "window:3,lower_right", "window:100,upper_left")),
        *((torch.bfloat16, mask) for mask in ("limits:packed", "limits:packed_each", "limits:whole")),
    ],
    ids=str,
)
def test_lower_precisions_beyond_one_block_of_rows(subject, dtype: torch.dtype, mask: str) -> None:
    problem = Problem(mask=mask, queries=270, keys=330, heads=(2, 1), dtype=dtype, size=8)
    check(subject, problem.spec()[0], problem.tensors(), solve(problem))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [200, 300])  # one block of rows, and more
def test_keys_that_a_block_of_rows_shares(subject, dtype: torch.dtype, queries: int) -> None:
    problem = Problem(mask="limits:blocks", queries=queries, keys=800, heads=(2, 1), dtype=dtype, size=8)
    check(subject, problem.spec()[0], problem.tensors(), solve(problem))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["causal:upper_left", "dense:each"])
@pytest.mark.parametrize("layout", ["fused", "heads_first", "transposed"])
def test_memory_layouts(subject, dtype: torch.dtype, mask: str, layout: str) -> None:
    """Slices of one fused projection, heads-first storage, and a last dimension that is not contiguous."""
    problem = Problem(mask=mask, queries=9, keys=9, heads=(4, 2), dtype=dtype, size=8)
    q, k, v, dout = problem.tensors()
    if layout == "fused":
        fused = torch.cat([x.flatten(2) for x in (q, k, v, dout)], dim=-1).split([32, 16, 16, 32], dim=-1)
        q, k, v, dout = (x.unflatten(-1, (-1, 8)) for x in fused)
    elif layout == "heads_first":
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    else:
        q, k, v, dout = (x.mT.contiguous().mT for x in (q, k, v, dout))
    check(subject, problem.spec()[0], (q, k, v, dout), solve(problem))


def test_the_expanded_gradient_of_a_sum(subject) -> None:
    problem = Problem(mask="causal:upper_left", queries=9, keys=9, heads=(4, 2))
    mask, visible = problem.spec()
    q, k, v, _ = problem.tensors()
    tensors = (q, k, v, torch.ones((), dtype=q.dtype).expand_as(q))
    check(subject, mask, tensors, brute_force(tensors, visible))


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mask", ["full", "causal:lower_right", "dense:each"])
def test_no_rows_or_no_keys(subject, mask: str, queries: int, keys: int) -> None:
    spec = MaskSpec.dense(torch.ones(1, queries, keys, dtype=torch.bool)) if mask == "dense:each" else None
    spec = on(subject.device, spec or Problem(mask=mask, queries=queries, keys=keys).spec()[0])
    tensors = Problem(mask=mask, queries=queries, keys=keys, heads=(4, 2), dtype=torch.float32).tensors()
    q, k, v, dout = (x.to(subject.device) for x in tensors)
    out, lse = subject.attention.forward(q, k, v, spec, SCALE)
    assert out.shape == q.shape
    assert lse.shape == (BATCH, 4, queries)
    assert not out.any()
    assert bool((lse == -math.inf).all())
    grads = subject.attention.backward(dout, q, k, v, out, lse, spec, SCALE)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_split_key_set_shares_the_gradients(subject, dtype: torch.dtype) -> None:
    """Two devices hold half the keys each; with the merged out and lse each backward returns exactly its share."""
    queries, keys, cut, device = 12, 17, 5, subject.device
    tensors = Problem(mask="full", queries=queries, keys=keys, heads=(4, 2), dtype=dtype, size=8).tensors()
    # Row 3 sees nothing at all, row 7 nothing of the first part; the others all of it and a causal second part.
    first = torch.ones(1, queries, cut, dtype=torch.bool)
    first[:, [3, 7]] = False
    ends = [0 if i == 3 else i + 1 for i in range(queries)]
    second = MaskSpec.limits(torch.zeros(1, queries, dtype=torch.int64), torch.tensor([ends]))
    parts = [(on(device, MaskSpec.dense(first)), slice(0, cut)), (on(device, second), slice(cut, keys))]

    def visible(b: int, i: int) -> list[int]:
        return ([] if i in (3, 7) else list(range(cut))) + list(range(cut, cut + ends[i]))

    q, k, v, dout = (x.to(device) for x in tensors)
    forwards = [subject.attention.forward(q, k[:, part], v[:, part], mask, SCALE) for mask, part in parts]
    out, lse = merge(*forwards[0], *forwards[1])
    shares = [
        subject.attention.backward(dout, q, k[:, part], v[:, part], out.to(dtype), lse, mask, SCALE)
        for mask, part in parts
    ]
    exact = brute_force(tensors, visible)
    assert torch.equal(lse.cpu() == -math.inf, exact.lse == -math.inf)
    assert distance(out, exact.out) <= TOLERANCE[dtype]
    assert distance(shares[0][0].double() + shares[1][0].double(), exact.grads[0]) <= TOLERANCE[dtype]
    assert distance(torch.cat([s[1] for s in shares], dim=1), exact.grads[1]) <= TOLERANCE[dtype]
    assert distance(torch.cat([s[2] for s in shares], dim=1), exact.grads[2]) <= TOLERANCE[dtype]


class LargestTensor(TorchDispatchMode):
    """The largest number of elements any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


@pytest.mark.parametrize("mask", [name for name in MASKS if not name.startswith("dense")])
def test_no_square_of_the_sequence_is_materialised(subject, mask: str) -> None:
    rows = 1536
    problem = Problem(mask=mask, queries=rows, keys=rows, dtype=torch.float32, size=8)
    spec = on(subject.device, problem.spec()[0])
    q, k, v, dout = (x.to(subject.device) for x in problem.tensors())
    with LargestTensor() as largest:
        out, lse = subject.attention.forward(q, k, v, spec, SCALE)
        subject.attention.backward(dout, q, k, v, out, lse, spec, SCALE)
    assert largest.elements <= BATCH * 256 * rows
