"""Block attention against its definition: one softmax per slot over an explicit list of keys, all gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.attention.block import BlockForm, BlockMask, block_attention

SCALE = 0.41
# ||got - exact|| / ||exact||: fp64 and fp32 round at 1e-16 and 6e-8 a term. bf16: inputs are exact in the oracle; each
# part's kernel rounds its output, probabilities and gradients to 8 bits (4e-3), and their sum is rounded once more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}

FOURS = BlockMask(size=4)
MASKS = [
    FOURS,
    BlockMask(size=4, causal=True),
    BlockMask(size=4, window=1),
    BlockMask(size=4, window=3),
    BlockMask(size=4, window=3, causal=True),
    BlockMask(size=4, window=6),
    BlockMask(size=4, window=6, causal=True),
    BlockMask(size=1),
    BlockMask(size=3, window=1, causal=True),
]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Rows of blocks. `lengths` are of each row's documents; `anchors` are None where a block only fills the row."""

    mask: BlockMask = FOURS
    lengths: tuple[tuple[int, ...], ...] = ((5, 8, 3), (16,))
    anchors: tuple[tuple[int | None, ...], ...] = ((0, 3, 5, 12, 15), (1, 7, 15, None, None))
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.float64
    size: int = 8

    def context_mask(self) -> Any:
        document = [self.document(row) for row in range(len(self.lengths))]
        anchors = [[5 if a is None else a for a in row] for row in self.anchors]
        first = [
            [5 if a is None else document[b].index(document[b][a]) for a in row] for b, row in enumerate(self.anchors)
        ]
        return self.mask.context(torch.tensor(anchors), torch.tensor(first))

    def document(self, row: int) -> list[int]:
        return [number for number, length in enumerate(self.lengths[row]) for _ in range(length)]

    def context_keys(self, b: int, anchor: int | None, slot: int) -> list[int]:
        """Strictly before the anchor, in its document, and not `window` or more positions before the slot."""
        if anchor is None:
            return []
        document, window = self.document(b), self.mask.window
        return [
            j
            for j in range(len(document))
            if document[j] == document[anchor] and j < anchor and (window is None or anchor + slot - j < window)
        ]

    def own_keys(self, slot: int) -> list[int]:
        causal, window = self.mask.causal, self.mask.window
        return [
            m
            for m in range(self.mask.size)
            if (m <= slot or not causal) and (window is None or slot - m < window)
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, context key, context value, own key, own value; and the gradient of the output."""

    leaves: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    dout: Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
        leaves: Any = tuple(x.detach().to(device, dtype).requires_grad_() for x in self.leaves)
        return Inputs(leaves=leaves, dout=self.dout.to(device, dtype))


def make(problem: Problem) -> Inputs:
    generator = torch.Generator().manual_seed(problem.mask.size)
    keys, queries = sum(problem.lengths[0]), len(problem.anchors[0]) * problem.mask.size

    def draw(rows: int, heads: int) -> Tensor:
        shape = (len(problem.lengths), rows, heads, problem.size)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(problem.dtype)

    heads, key_heads = problem.heads
    leaves = (draw(queries, heads), *(draw(rows, key_heads) for rows in (keys, keys, queries, queries)))
    return Inputs(leaves=leaves, dout=draw(queries, heads))  # type: ignore[arg-type]


def brute_force(problem: Problem, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(out, gradients of the leaves) in float64."""
    exact = inputs.to(torch.device("cpu"), torch.float64)
    q, context_key, context_value, own_key, own_value = exact.leaves
    group = problem.heads[0] // problem.heads[1]
    outs = []
    for b in range(len(problem.lengths)):
        for a, anchor in enumerate(problem.anchors[b]):
            for slot in range(problem.mask.size):
                context = problem.context_keys(b, anchor, slot)
                own = [a * problem.mask.size + m for m in problem.own_keys(slot)]
                for h in range(problem.heads[0]):
                    k = torch.cat((context_key[b, context, h // group], own_key[b, own, h // group]))
                    v = torch.cat((context_value[b, context, h // group], own_value[b, own, h // group]))
                    weights = (k @ q[b, a * problem.mask.size + slot, h] * SCALE).exp()
                    outs.append(weights @ v / weights.sum())
    out = torch.stack(outs).view(q.shape)
    grads = torch.autograd.grad(out, exact.leaves, exact.dout, allow_unused=True, materialize_grads=True)
    return out.detach(), grads


def form(subject: Any, problem: Problem) -> BlockForm:
    return BlockForm(
        context=subject.attention,
        own=subject.attention,
        mask=problem.context_mask(),
        block=problem.mask,
        scale=SCALE,
    )


def attend(subject: Any, problem: Problem, here: Inputs) -> Tensor:
    q, context_key, context_value, own_key, own_value = here.leaves
    return block_attention(form(subject, problem), q, (context_key, context_value), (own_key, own_value))


def distance(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    return float((got.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1.0))


NAMES = ("q", "context key", "context value", "own key", "own value")


def check(subject: Any, problem: Problem, inputs: Inputs | None = None) -> None:
    inputs = inputs or make(problem)
    exact_out, exact_grads = brute_force(problem, inputs)
    here = inputs.to(subject.device)
    out = attend(subject, problem, here)
    grads = torch.autograd.grad(out, here.leaves, here.dout)
    tolerance = TOLERANCE[problem.dtype]
    assert out.dtype == problem.dtype
    assert distance(out, exact_out) <= tolerance
    for name, got, exact in zip(NAMES, grads, exact_grads, strict=True):
        assert got.dtype == problem.dtype
        assert distance(got, exact) <= tolerance, f"gradient of {name}"


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_packed_documents_under_every_mask(subject, mask: BlockMask) -> None:
    check(subject, Problem(mask=mask))


@pytest.mark.parametrize("heads", [(4, 4), (3, 1)], ids=str)
def test_heads(subject, heads: tuple[int, int]) -> None:
    check(subject, Problem(heads=heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS[:5], ids=str)
def test_lower_precisions(subject, dtype: torch.dtype, mask: BlockMask) -> None:
    check(subject, Problem(mask=mask, dtype=dtype))


def test_the_sum_of_parts_is_rounded_once(subject) -> None:
    """bf16 with one key in each part: parts are exact, so the output is what rounding the exact one gives."""
    problem = Problem(
        mask=BlockMask(size=1), lengths=((2, 2, 2, 2),), anchors=((1, 3, 5, 7),), heads=(2, 1), dtype=torch.bfloat16
    )
    inputs = make(problem)
    exact, _ = brute_force(problem, inputs)
    out = attend(subject, problem, inputs.to(subject.device)).cpu()
    assert distance(out, exact) <= 1.01 * distance(exact.bfloat16(), exact)


def test_no_block_has_any_context(subject) -> None:
    """All anchors open their documents, or there are none."""
    check(subject, Problem(anchors=((0, 5, 13, None), (0, None, None, None))))


def test_a_context_of_no_keys(subject) -> None:
    problem = Problem(lengths=((), ()), anchors=((None,) * 2,) * 2)
    inputs = make(problem)
    assert inputs.leaves[1].shape[1] == 0
    check(subject, problem, inputs)


def test_decoding_reads_caches_of_different_lengths(subject) -> None:
    """One block a row, after as many keys as the row has; what stands behind them in the cache is another's."""
    check(subject, Problem(mask=BlockMask(size=5), lengths=((9, 4), (3, 10), (12, 1)), anchors=((8,), (2,), (11,))))


def test_long_rows_of_many_blocks(subject) -> None:
    """More queries than a masked tile has rows, and documents that are one long run of equal limits."""
    anchors = tuple(range(1, 100, 7)) + (100,) * 15 + tuple(range(101, 130, 2))
    problem = Problem(
        mask=BlockMask(size=8, window=50), lengths=((90, 20, 20),), anchors=(anchors,), heads=(1, 1), size=4
    )
    check(subject, problem)
    check(subject, replace(problem, mask=BlockMask(size=8)))


@pytest.mark.parametrize("part", [1, 3])
def test_extreme_scores(subject, part: int) -> None:
    """Either part's scores dominate and vanish, beyond the range of exp."""
    problem = Problem(anchors=((3, 4), (2, 9)), heads=(1, 1))
    inputs = make(problem)
    inputs.leaves[part].mul_(400.0)
    here = inputs.to(subject.device)
    out = attend(subject, problem, here)
    grads = torch.autograd.grad(out, here.leaves, here.dout)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    q, context_key, context_value, own_key, own_value = inputs.leaves
    for block, anchor in enumerate(problem.anchors[0]):
        for slot in range(block * 4, block * 4 + 4):
            keys = torch.cat((context_key[0, :anchor, 0], own_key[0, block * 4 : block * 4 + 4, 0]))
            values = torch.cat((context_value[0, :anchor, 0], own_value[0, block * 4 : block * 4 + 4, 0]))
            expected = (keys @ q[0, slot, 0] * SCALE).softmax(0) @ values
            assert torch.allclose(out[0, slot, 0].cpu(), expected, atol=1e-12)


def test_layouts_and_an_expanded_gradient(subject) -> None:
    inputs = make(Problem())
    q, context_key, context_value, own_key, own_value = inputs.leaves
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([context_key, context_key], dim=2)[:, :, :2],
        context_value.mT.contiguous().mT,
        own_key.mT.contiguous().mT,
        torch.cat([own_value, own_value], dim=2)[:, :, :2],
    )
    dout = torch.ones((), dtype=torch.float64).expand_as(inputs.dout)
    check(subject, Problem(), Inputs(leaves=strided, dout=dout))


def test_a_retained_graph_gives_the_same_gradients_twice(subject) -> None:
    here = make(Problem()).to(subject.device)
    out = attend(subject, Problem(), here)
    first = torch.autograd.grad(out, here.leaves, here.dout, retain_graph=True)
    second = torch.autograd.grad(out, here.leaves, here.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused(subject) -> None:
    here = make(Problem()).to(subject.device)
    out = attend(subject, Problem(), here)
    (dq,) = torch.autograd.grad(out, here.leaves[0], here.dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_keys_are_saved_by_reference(subject) -> None:
    here = make(Problem()).to(subject.device)
    out = attend(subject, Problem(), here)
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert {x.data_ptr() for x in here.leaves} <= {x.data_ptr() for x in saved}
    assert len(saved) == len(here.leaves) + 2  # out and lse


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


@pytest.mark.parametrize("mask", [BlockMask(size=16), BlockMask(size=16, window=300, causal=True)], ids=str)
def test_nothing_is_as_large_as_queries_times_keys(subject, mask: BlockMask) -> None:
    rows = 1536
    anchors = tuple(range(0, rows, mask.size))
    problem = Problem(mask=mask, lengths=((rows,),), anchors=(anchors,), heads=(1, 1), dtype=torch.float32)
    here = make(problem).to(subject.device)
    with LargestTensor() as largest:
        attend(subject, problem, here).backward(here.dout)
    assert largest.elements <= 256 * rows


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 4, "window": 0}], ids=str)
def test_masks_of_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockMask(**wrong)


def test_rows_that_are_no_whole_blocks_are_refused(subject) -> None:
    here = make(Problem()).to(subject.device)
    q, context_key, context_value, own_key, own_value = here.leaves
    how = form(subject, Problem())
    for rows, complaint in ((18, "no blocks of 4"), (0, "no block")):
        cut = (own_key[:, :rows], own_value[:, :rows])
        with pytest.raises(AssertionError, match=complaint):
            block_attention(how, q[:, :rows], (context_key, context_value), cut)
    with pytest.raises(AssertionError, match="one key of its own"):
        block_attention(how, q, (context_key, context_value), (own_key[:, 1:], own_value[:, 1:]))
