"""Linear maps and heads in FP8: values and all gradients are products, in float64, of what their operands stand for.

The operands themselves are held against their definition in test_fp8.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.models import fused
from torchspec.core.ops.fp8 import E4M3, E5M2, Scaled, Scaling, emulated_scaled_mm, scaled, scaled_across
from torchspec.core.ops.maps import Fp8Maps, FrozenOperands, LinearMaps, OutputHead

SMALL = 3 * 48 * 4
EPS = 1e-2
R, H, Z = 21, 48, (32, 16, 20)  # rows are no multiple of 16, and nor is what the last map makes
CLOSE = 2e-6
"""Relative 2-norm in fp32, whose sums are of some tens of terms."""


@dataclass
class Counted:
    """The emulated products; which sizes were asked for."""

    temporary_bytes: int = SMALL
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        assert a.values.shape[1] == b.values.shape[1]
        assert a.values.shape[1] % 16 == len(b.values) % 16 == 0, "sizes that hardware does not take"
        assert b.values.dtype == E4M3
        self.asked.append((len(a.values), a.values.shape[1], len(b.values)))
        return emulated_scaled_mm(a, b, dtype)


def ops_in(scaling: Scaling, products: Counted | None = None, frozen: FrozenOperands | None = None) -> FusedOps:
    maps = Fp8Maps(products or Counted(), scaling, frozen or FrozenOperands())
    return FusedOps().with_maps(maps)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = torch.logspace(-2, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return (made * spread).to(dtype)


def by_rows(x: Tensor, scaling: Scaling, dtype: torch.dtype = E4M3) -> Tensor:
    operand = scaled(x.detach(), dtype, scaling, SMALL)
    return operand.values.double() * operand.scale.double()


def by_columns(x: Tensor, scaling: Scaling, dtype: torch.dtype = E4M3) -> Tensor:
    operand = scaled_across(x.detach(), dtype, scaling, SMALL)
    return (operand.values.double() * operand.scale.double()).T[: len(x)]


def gradient_format(scaling: Scaling) -> torch.dtype:
    return E4M3 if scaling == "row" else E5M2


def mapped(x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
    """x W^T; as it is where a size of W is no multiple of 16."""
    if any(size % 16 for size in weight.shape):
        return x.detach().double() @ weight.detach().double().T
    return by_rows(x, scaling) @ by_rows(weight, scaling).T


def back(dout: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
    if any(size % 16 for size in weight.shape):
        return dout.double() @ weight.detach().double()
    return by_rows(dout, scaling, gradient_format(scaling)) @ by_columns(weight, scaling)


def of_weight(dout: Tensor, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
    if any(size % 16 for size in weight.shape):
        return dout.double().T @ x.detach().double()
    return by_columns(dout, scaling, gradient_format(scaling)).T @ by_columns(x, scaling)


def close(got: Tensor | None, wanted: Tensor, limit: float = CLOSE) -> None:
    assert got is not None
    assert got.shape == wanted.shape
    wanted = wanted.detach()
    assert float((got.detach().double() - wanted).norm() / wanted.norm()) <= limit


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("size", Z)
def test_a_map_and_its_three_gradients(scaling: Scaling, size: int) -> None:
    x, weight, residual = (random(n, *shape).requires_grad_() for n, shape in enumerate(((R, H), (size, H), (R, size))))
    dout = random(5, R, size)
    out = fused.linear(x.view(3, 7, H), weight, ops_in(scaling), residual.view(3, 7, size))
    close(out.flatten(0, 1), residual.detach().double() + mapped(x, weight, scaling))
    out.flatten(0, 1).backward(dout)
    close(x.grad, back(dout, weight, scaling))
    close(weight.grad, of_weight(dout, x, weight, scaling))
    assert torch.equal(residual.grad, dout)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_maps_of_a_norm(scaling: Scaling) -> None:
    ops = ops_in(scaling)
    x, norm = random(0, R, H).requires_grad_(), (1 + 0.1 * random(1, H)).requires_grad_()
    weights = [random(2 + n, size, H).requires_grad_() for n, size in enumerate(Z)]
    adds: list[Tensor | None] = [random(6, R, Z[0]).requires_grad_(), None, None]
    douts = [random(7 + n, R, size) for n, size in enumerate(Z)]
    outs = fused.normed_linear(x, norm, EPS, weights, adds, ops)
    normed, kept = ops.rms_norm(x.detach(), norm.detach(), EPS)
    for out, weight, add in zip(outs, weights, adds, strict=True):
        close(out, mapped(normed, weight, scaling) + (0 if add is None else add.detach().double()))
    torch.autograd.backward(outs, douts)
    dnormed = sum(back(dout, weight, scaling) for dout, weight in zip(douts, weights, strict=True))
    assert isinstance(dnormed, Tensor)
    dx, dnorm = FusedOps().rms_norm_backward(dnormed.float(), x.detach(), norm.detach(), kept)
    close(x.grad, dx.double(), 1e-5)
    close(norm.grad, dnorm.double(), 1e-5)
    for weight, dout in zip(weights, douts, strict=True):
        close(weight.grad, of_weight(dout, normed, weight, scaling))


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_a_map_of_a_gate(scaling: Scaling) -> None:
    ops = ops_in(scaling)
    gate, up, residual = (random(n, R, H).requires_grad_() for n in range(3))
    weight, dout = random(3, H, H).requires_grad_(), random(4, R, H)
    out = fused.gated_linear(gate, up, weight, residual, ops)
    gated = ops.swiglu(gate.detach(), up.detach())
    close(out, residual.detach().double() + mapped(gated, weight, scaling))
    out.backward(dout)
    again, dgate, dup = ops.swiglu_backward(back(dout, weight, scaling).float(), gate.detach(), up.detach())
    close(gate.grad, dgate.double(), 1e-5)
    close(up.grad, dup.double(), 1e-5)
    close(weight.grad, of_weight(dout, again, weight, scaling))


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_a_head_and_its_gradients(scaling: Scaling) -> None:
    """Rows are bf16, logits fp32, and gradients are put into FP8 without being rounded to bf16 first."""
    rows, weight = random(0, R, H, dtype=torch.bfloat16), random(1, 64, H, dtype=torch.bfloat16)
    dlogits = random(2, R, 64)
    ops = ops_in(scaling)
    head = ops.maps.head(weight, ops, frozen=True)
    assert head.room(R, torch.float32) is None
    logits = head.logits(rows)
    assert logits.dtype == torch.float32
    close(logits, mapped(rows, weight, scaling))
    assert head.narrowed(dlogits, rows) is dlogits
    total = torch.ones(64, H)
    drows = head.backward(dlogits, rows, total)
    assert drows.dtype == torch.bfloat16
    close(drows, back(dlogits, weight, scaling), 2.0**-8)
    close(total, 1 + of_weight(dlogits, rows, weight, scaling))
    close(head.backward(dlogits, rows, None), drows.double(), 0.0)


def test_a_head_of_other_sizes_is_what_it_was() -> None:
    ops = ops_in("row")
    head = ops.maps.head(random(1, 60, H, dtype=torch.bfloat16), ops, frozen=True)
    assert type(head) is OutputHead


def test_bf16_maps_of_both_kinds_return_bf16_and_are_near_each_other() -> None:
    x, weight = random(0, 64, H, dtype=torch.bfloat16), random(1, 32, H, dtype=torch.bfloat16)
    (plain,) = LinearMaps().forward(x, [weight], [None])
    for scaling in ("row", "tensor"):
        (out,) = ops_in(scaling).maps.forward(x, [weight], [None])
        assert out.dtype == torch.bfloat16
        close(out, plain.double(), 0.05)


def test_with_a_scale_for_each_row_it_does_not_matter_which_rows_are_beside() -> None:
    """Of the output and of the gradient of the input; so neither do micro-batches and ranks."""
    x, weight, dout = random(0, R, H), random(1, 32, H), random(2, R, 32)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        given = x[rows].clone().requires_grad_()
        out = fused.linear(given, weight.clone().requires_grad_(), ops_in("row"))
        out.backward(dout[rows])
        assert given.grad is not None
        return out.detach(), given.grad

    whole, parts = run(slice(None)), [run(slice(0, 8)), run(slice(8, R))]
    for got, *pieces in zip(whole, *parts, strict=True):
        close(torch.cat(pieces), got.double(), 1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_what_is_not_finite_is_seen_behind_a_map_and_in_its_gradients(scaling: Scaling, bad: float) -> None:
    x, weight = random(0, R, H), random(1, 32, H).requires_grad_()
    x[4, 7] = bad
    out = fused.linear(x, weight, ops_in(scaling))
    assert not out[4].isfinite().any()
    out.nan_to_num().sum().backward()
    assert weight.grad is not None
    assert not weight.grad.isfinite().all()


class Making:
    """Counts what is put into FP8, by number of rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        for name in ("scaled", "scaled_across"):
            monkeypatch.setattr(f"torchspec.core.ops.maps.{name}", self._counting(globals()[name]))

    def _counting(self, work: object) -> object:
        def counted(x: Tensor, *rest: object) -> Scaled:
            self.made.append(len(x))
            return work(x, *rest)  # type: ignore[operator,no-any-return]

        return counted

    def of(self, rows: int) -> int:
        return self.made.count(rows)


def steps(x: Tensor, weight: Tensor, ops: FusedOps) -> None:
    """Three uses of one weight, cut anew each time."""
    outs = [fused.linear(x, weight[:, :H], ops) for _ in range(3)]
    torch.autograd.backward([out.sum() for out in outs])


def test_a_trained_weight_is_made_ready_once_a_micro_batch_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    making = Making(monkeypatch)
    weight, x = random(0, 64, 2 * H).requires_grad_(), random(1, R, H).requires_grad_()
    frozen = FrozenOperands()
    for _ in range(2):
        steps(x, weight, ops_in("row", frozen=frozen))
    assert making.of(64) == 4


def test_what_was_made_of_a_weight_is_not_used_after_it_changed() -> None:
    """Sharding writes into the same memory without counting a version."""
    weight, x = random(0, 32, H).requires_grad_(), random(1, R, H)
    frozen = FrozenOperands()
    before = fused.linear(x, weight, ops_in("row", frozen=frozen))
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.mul_(-1)
    close(fused.linear(x, weight, ops_in("row", frozen=frozen)), -before.detach().double(), 0.0)


def test_a_frozen_head_is_made_ready_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    making = Making(monkeypatch)
    weight, rows, dlogits = random(0, 64, H), random(1, R, H), random(2, R, 64)
    frozen = FrozenOperands()
    results: list[Sequence[Tensor]] = []
    for _ in range(3):
        ops = ops_in("row", frozen=frozen)
        head = ops.maps.head(weight, ops, frozen=True)
        results.append((head.logits(rows), head.backward(dlogits, rows, None)))
    assert making.of(64) == 2
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    weight.neg_()
    ops = ops_in("row", frozen=frozen)
    close(ops.maps.head(weight, ops, frozen=True).logits(rows), -results[0][0].double(), 0.0)
    del weight, head
    frozen.keep(rows, scaled(rows, E4M3, "row", SMALL), across=False)
    assert len(frozen._made) == 1, "what is made of a weight goes with it"
