"""Checks of `FusedOps` against definitions under autograd, in float64 on the host."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.conformance.checks import Check
from torchspec.devices.api import Label, TilePairs, TileTeacher
from torchspec.devices.conformance.subject import TOLERANCE, Subject, Worst

EPS = 0.03  # large: an adapter that leaves it out is seen


def _random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.float64, copy=True).requires_grad_() for x in tensors]


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def _turned(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos_BSD[:, :, None] + torch.cat([-second, first], dim=-1) * sin_BSD[:, :, None]


def rms_norm(subject: Subject) -> str:
    worst = Worst()
    for dtype in subject.dtypes:
        x, dy = (_random(3, 17, 96, seed=seed, dtype=dtype) for seed in (1, 2))
        weight = 1 + 0.3 * _random(96, seed=3, dtype=dtype)
        wide = _wide(x, weight)
        exact = _normed(*wide)
        wanted = torch.autograd.grad(exact, wide, dy.to(torch.float64))
        x, dy, weight = (t.to(subject.where) for t in (x, dy, weight))
        y, kept = subject.device.ops.rms_norm(x, weight, EPS)
        assert y.dtype == dtype, f"y is {y.dtype}, not {dtype}"
        assert kept.numel() == 3 * 17, f"what the gradient needs has {kept.numel()} values, not one for each row"
        dx, dweight = subject.device.ops.rms_norm_backward(dy, x, weight, kept)
        for name, got, want in (("y", y, exact), ("dx", dx, wanted[0]), ("dweight", dweight, wanted[1])):
            assert got.dtype == dtype, f"{name} is {got.dtype}, not {dtype}"
            worst.compare(f"{name}, {dtype}", got, want.detach(), TOLERANCE[dtype])
    return str(worst)


def rotary(subject: Subject) -> str:
    worst = Worst()
    for dtype in subject.dtypes:
        x, dout = (_random(2, 9, 3, 64, seed=seed, dtype=dtype) for seed in (1, 2))
        angle = _random(2, 9, 32, seed=3, dtype=torch.float64).repeat(1, 1, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        (wide,) = _wide(x)
        exact = _turned(wide, cos.to(torch.float64), sin.to(torch.float64))
        (wanted,) = torch.autograd.grad(exact, wide, dout.to(torch.float64))
        x, dout, cos, sin = (t.to(subject.where) for t in (x, dout, cos, sin))
        turned = subject.device.ops.rotary(x, cos, sin)
        assert turned.dtype == dtype, f"the result is {turned.dtype}, not {dtype}"
        worst.compare(f"turned, {dtype}", turned, exact.detach(), TOLERANCE[dtype])
        worst.compare(f"turned back, {dtype}", subject.device.ops.rotary(dout, cos, -sin), wanted, TOLERANCE[dtype])
    return str(worst)


def swiglu(subject: Subject) -> str:
    worst = Worst()
    for dtype in subject.dtypes:
        gate, up, dout = (_random(2, 11, 48, seed=seed, dtype=dtype) for seed in (1, 2, 3))
        wide = _wide(gate, up)
        exact = F.silu(wide[0]) * wide[1]
        wanted = torch.autograd.grad(exact, wide, dout.to(torch.float64))
        gate, up, dout = (t.to(subject.where) for t in (gate, up, dout))
        kept = (gate.clone(), up.clone())
        got = subject.device.ops.swiglu(gate, up)
        worst.compare(f"silu(gate) * up, {dtype}", got, exact.detach(), TOLERANCE[dtype])
        again, dgate, dup = subject.device.ops.swiglu_backward(dout.clone(), gate, up)
        assert all(map(torch.equal, (gate, up), kept)), "gate or up was changed"
        for name, got, want in (("again", again, exact), ("dgate", dgate, wanted[0]), ("dup", dup, wanted[1])):
            assert got.dtype == dtype, f"{name} is {got.dtype}, not {dtype}"
            worst.compare(f"{name}, {dtype}", got, want.detach(), TOLERANCE[dtype])
    return str(worst)


def wide_products(subject: Subject) -> str:
    """Half precision in, sums and results in fp32."""
    worst = Worst()
    ops = subject.device.ops
    for dtype in subject.dtypes:
        a, b = _random(40, 300, seed=1, dtype=dtype), _random(300, 24, seed=2, dtype=dtype)
        exact = a.to(torch.float64) @ b.to(torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        a, b = ops.wide_operand(a.to(subject.where)), ops.wide_operand(b.to(subject.where))
        product = ops.wide_mm(a, b)
        assert product.dtype == wide, f"the product of {dtype} is {product.dtype}, not {wide}"
        worst.compare(f"product, {dtype}", product, exact, TOLERANCE[wide])
        into = torch.empty_like(product)
        ops.wide_mm(a, b, out=into)
        worst.compare(f"product into a buffer, {dtype}", into, exact, TOLERANCE[wide])
    return str(worst)


def distillation(subject: Subject) -> str:
    """Cross-entropy to a teacher, and to labels: values, acceptance, first choices and the gradient of the logits."""
    worst = Worst()
    pairs, rows, size = 12, 7, 50
    z = 2 * _random(pairs, size, seed=1, dtype=torch.float32)
    teacher = (2 * _random(rows, size, seed=2, dtype=torch.float32)).softmax(-1)
    row, weight = torch.tensor([*range(2, 7), *range(7)]), torch.linspace(0.2, 1.0, pairs)
    label_weight, label = torch.linspace(1.0, 0.1, pairs), torch.arange(pairs) * 3 - 3  # the first teaches nothing
    wide = z.to(torch.float64).requires_grad_()
    log_q, p = wide.log_softmax(-1), teacher.to(torch.float64)[row]
    to_teacher, to_label = -(p * log_q).sum(-1), -log_q.gather(1, label.clamp(min=0)[:, None])[:, 0] * (label >= 0)
    (wanted,) = torch.autograd.grad((weight * to_teacher + label_weight * to_label).sum(), wide)
    here = subject.where
    logits = z.to(here)
    terms = subject.device.ops.distillation_tile(
        logits,
        TileTeacher(probs_RN=teacher.to(here)),
        TilePairs(
            row_C=row.to(here),
            runs=[(0, 5, 2), (5, 12, 0)],
            weight={"cross_entropy": weight.to(here)},
            labels={"label": Label(weight_C=label_weight.to(here), index_C=label.to(here))},
        ),
        with_grad=True,
    )
    for name, got, exact in (
        ("cross_entropy", terms.value["cross_entropy"], to_teacher.detach()),
        ("label", terms.value["label"], to_label.detach()),
        ("alpha", terms.alpha_C, torch.minimum(p, log_q.detach().exp()).sum(-1)),
        ("the gradient", logits, wanted),
    ):
        worst.compare(name, got, exact, TOLERANCE[torch.float32])
    assert torch.equal(terms.best_C.cpu(), z.argmax(-1)), "best_C is not the index of the largest logit"
    return str(worst)


OPS = (
    Check("ops: rms norm and its gradients", rms_norm),
    Check("ops: rotary positions and back", rotary),
    Check("ops: swiglu and its gradients", swiglu),
    Check("ops: products that sum in fp32", wide_products),
    Check("ops: distillation tile", distillation),
)
