"""TTT attention against its definition: one softmax per row over an explicit list of keys, all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.mask import MaskSpec

SCALE = 0.41
# ||got - exact|| / ||exact||: fp64 and fp32 round at 1e-16 and 6e-8 a term. bf16: inputs are exact in the oracle; the
# prefix's kernel rounds its output, probabilities and gradients to 8 bits (4e-3), the diagonals only their results.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3}

Visible = Callable[[int, int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    dout: Tensor

    def to(self, device: torch.device) -> Inputs:
        return Inputs(
            q=self.q.to(device).requires_grad_(),
            keys=[x.to(device).requires_grad_() for x in self.keys],
            values=[x.to(device).requires_grad_() for x in self.values],
            dout=self.dout.to(device),
        )

    def leaves(self) -> list[Tensor]:
        return [self.q, *self.keys, *self.values]


def make(steps: int, *, rows: int = 6, prefix: int = 6, heads: tuple[int, int] = (4, 2), dtype: Any = None) -> Inputs:
    generator = torch.Generator().manual_seed(steps)

    def draw(count: int, heads: int) -> Tensor:
        return torch.randn(2, count, heads, 8, dtype=torch.float64, generator=generator).to(dtype or torch.float64)

    return Inputs(
        q=draw(rows, heads[0]),
        keys=[draw(prefix if s == 0 else rows, heads[1]) for s in range(steps)],
        values=[draw(prefix if s == 0 else rows, heads[1]) for s in range(steps)],
        dout=draw(rows, heads[0]),
    )


def brute_force(inputs: Inputs, visible: Visible) -> tuple[Tensor, list[Tensor]]:
    """(out, gradients of q, every key, every value) in float64."""
    exact = Inputs(
        q=inputs.q.detach().double().requires_grad_(),
        keys=[x.detach().double().requires_grad_() for x in inputs.keys],
        values=[x.detach().double().requires_grad_() for x in inputs.values],
        dout=inputs.dout.double(),
    )
    batch, rows, heads, _ = exact.q.shape
    group = heads // exact.keys[0].shape[2]
    outs = []
    for b in range(batch):
        for i in range(rows):
            for h in range(heads):
                # Row i sees the prefix keys the mask allows, then its own key of every later step.
                slots = [(0, j) for j in visible(b, i)] + [(s, i) for s in range(1, len(exact.keys))]
                if not slots:
                    outs.append(exact.q[b, i, h] * 0)
                    continue
                k = torch.stack([exact.keys[s][b, j, h // group] for s, j in slots])
                v = torch.stack([exact.values[s][b, j, h // group] for s, j in slots])
                weights = (k @ exact.q[b, i, h] * SCALE).exp()
                outs.append(weights @ v / weights.sum())
    out = torch.stack(outs).view(exact.q.shape)
    grads = torch.autograd.grad(out, exact.leaves(), exact.dout, allow_unused=True, materialize_grads=True)
    return out.detach(), list(grads)


def distance(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    return float((got.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1.0))


def check(subject, inputs: Inputs, mask: MaskSpec, visible: Visible) -> None:
    exact_out, exact_grads = brute_force(inputs, visible)
    here = inputs.to(subject.device)
    out = ttt_attention(subject.attention, here.q, here.keys, here.values, mask, SCALE)
    grads = torch.autograd.grad(out, here.leaves(), here.dout)
    tolerance = TOLERANCE[inputs.q.dtype]
    assert out.dtype == inputs.q.dtype
    assert distance(out, exact_out) <= tolerance
    for index, (got, exact) in enumerate(zip(grads, exact_grads, strict=True)):
        assert got.dtype == inputs.q.dtype
        assert distance(got, exact) <= tolerance, f"gradient {index} of q, {len(inputs.keys)} keys, values"


def causal(b: int, i: int) -> list[int]:
    return list(range(i + 1))


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)], ids=str)
def test_causal_prefix_and_every_number_of_steps(subject, steps: int, heads: tuple[int, int]) -> None:
    check(subject, make(steps, heads=heads), MaskSpec.causal(), causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_lower_precisions(subject, dtype: torch.dtype, steps: int) -> None:
    check(subject, make(steps, rows=12, prefix=12, dtype=dtype), MaskSpec.causal(), causal)


def test_packed_documents(subject) -> None:
    first = [0, 0, 0, 3, 4, 4]
    rows = torch.arange(6, device=subject.device)
    mask = MaskSpec.limits(torch.tensor([first], device=subject.device), rows[None] + 1)
    check(subject, make(4), mask, lambda b, i: list(range(first[i], i + 1)))


def test_a_sliding_window(subject) -> None:
    check(subject, make(3), MaskSpec.sliding(2), lambda b, i: [j for j in (i - 1, i) if j >= 0])


def test_a_shard_with_more_prefix_keys_than_rows(subject) -> None:
    """A sequence-parallel rank's rows come after the keys of earlier ranks."""
    inputs = make(3, rows=4, prefix=9)
    check(subject, inputs, MaskSpec.causal("lower_right"), lambda b, i: list(range(i + 6)))


@pytest.mark.parametrize("steps", [1, 3])
def test_rows_without_prefix_keys(subject, steps: int) -> None:
    """Rows 0 and 4 see no prefix: their diagonals alone; without diagonals output and gradients are 0, not NaN."""
    ends = [0, 2, 3, 4, 0, 6]
    ends_BQ = torch.tensor([ends], device=subject.device)
    mask = MaskSpec.limits(torch.zeros_like(ends_BQ), ends_BQ)
    check(subject, make(steps), mask, lambda b, i: list(range(ends[i])))


def test_extreme_scores(subject) -> None:
    """Diagonal scores that dominate and that vanish, beyond the range of exp."""
    inputs = make(3)
    inputs.keys[1].mul_(400.0)
    exact_scores = torch.einsum("bthd,bthd->bth", inputs.q, inputs.keys[1].repeat_interleave(2, 2)) * SCALE
    assert exact_scores.max() > 710 > -745 > exact_scores.min()  # exp overflows and underflows
    here = inputs.to(subject.device)
    out = ttt_attention(subject.attention, here.q, here.keys, here.values, MaskSpec.causal(), SCALE)
    grads = torch.autograd.grad(out, here.leaves(), here.dout)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    b, i, h = (int(x) for x in torch.unravel_index(exact_scores.argmax(), exact_scores.shape))
    assert torch.allclose(out[b, i, h].cpu(), inputs.values[1][b, i, h // 2], atol=1e-12)


class SmallChunks:
    """A device whose temporaries hold a row or two, so that every chunk boundary is crossed."""

    def __init__(self, inner: Any, temporary_bytes: int) -> None:
        self.temporary_bytes = temporary_bytes
        self.forward, self.backward = inner.forward, inner.backward


@pytest.mark.parametrize("temporary_bytes", [1, 4 * 2 * 3 * 2 * 8 * 4])
def test_chunks_of_rows(subject, temporary_bytes: int) -> None:
    @dataclass(frozen=True)
    class Chunked:
        attention: Any
        device: torch.device

    chunked = Chunked(SmallChunks(subject.attention, temporary_bytes), subject.device)
    check(chunked, make(4, rows=7, prefix=7), MaskSpec.causal(), causal)


def test_layouts_and_an_expanded_gradient(subject) -> None:
    inputs = make(3)
    strided = Inputs(
        q=inputs.q.transpose(1, 2).contiguous().transpose(1, 2),
        keys=[torch.cat([x, x], dim=2)[:, :, :2] for x in inputs.keys],
        values=[x.mT.contiguous().mT for x in inputs.values],
        dout=torch.ones((), dtype=torch.float64).expand_as(inputs.dout),
    )
    check(subject, strided, MaskSpec.causal(), causal)


def test_a_retained_graph_gives_the_same_gradients_twice(subject) -> None:
    here = make(4).to(subject.device)
    out = ttt_attention(subject.attention, here.q, here.keys, here.values, MaskSpec.causal(), SCALE)
    first = torch.autograd.grad(out, here.leaves(), here.dout, retain_graph=True)
    second = torch.autograd.grad(out, here.leaves(), here.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused(subject) -> None:
    here = make(2).to(subject.device)
    out = ttt_attention(subject.attention, here.q, here.keys, here.values, MaskSpec.causal(), SCALE)
    (dq,) = torch.autograd.grad(out, here.q, here.dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_without_gradients_nothing_is_kept(subject) -> None:
    inputs = make(3)
    exact, _ = brute_force(inputs, causal)
    with torch.no_grad():
        here = inputs.to(subject.device)
        out = ttt_attention(subject.attention, here.q, here.keys, here.values, MaskSpec.causal(), SCALE)
    assert not out.requires_grad
    assert distance(out, exact) <= TOLERANCE[torch.float64]


def test_keys_are_saved_by_reference(subject) -> None:
    """An unroll of K steps keeps K keys alive, not K (K + 1) / 2 copies."""
    here = make(4).to(subject.device)
    out = ttt_attention(subject.attention, here.q, here.keys, here.values, MaskSpec.causal(), SCALE)
    saved = {x.data_ptr() for x in out.grad_fn.saved_tensors}  # type: ignore[union-attr]
    assert {x.data_ptr() for x in here.leaves()} <= saved
    assert len(out.grad_fn.saved_tensors) == len(here.leaves()) + 2  # out and lse  # type: ignore[union-attr]


def test_a_diagonal_of_another_shape_is_refused(subject) -> None:
    here = make(2, rows=6, prefix=6).to(subject.device)
    short = [here.keys[0], here.keys[1][:, :5]]
    with pytest.raises(AssertionError, match="one key per row"):
        ttt_attention(subject.attention, here.q, short, here.values, MaskSpec.causal(), math.sqrt(8))
