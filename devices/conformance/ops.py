"""Checks of `FusedOps` against definitions under autograd, in float64 on the host."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.conformance.checks import Check, NotHereError
from torchspec.core.ops.fp8 import E4M3, E5M2, scaled
from torchspec.devices.api import LOG_TERMS, SOFT_TERMS, Label, Scaled, TilePairs, TileTeacher
from torchspec.devices.conformance.subject import TOLERANCE, Subject, Worst, same

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
        assert got.dtype == dtype, f"silu(gate) * up is {got.dtype}, not {dtype}"
        worst.compare(f"silu(gate) * up, {dtype}", got, exact.detach(), TOLERANCE[dtype])
        again, dgate, dup = subject.device.ops.swiglu_backward(dout.clone(), gate, up)
        assert all(map(torch.equal, (gate, up), kept)), "gate or up was changed"
        for name, got, want in (("again", again, exact), ("dgate", dgate, wanted[0]), ("dup", dup, wanted[1])):
            assert got.dtype == dtype, f"{name} is {got.dtype}, not {dtype}"
            worst.compare(f"{name}, {dtype}", got, want.detach(), TOLERANCE[dtype])
    return str(worst)


def wide_products(subject: Subject) -> str:
    """Half precision in, sums and results in fp32; operands raw or made ready, turned or not, of one dtype or two."""
    worst = Worst()
    ops, where = subject.device.ops, subject.where
    for dtype in subject.dtypes:
        a, b = _random(40, 300, seed=1, dtype=dtype), _random(300, 24, seed=2, dtype=dtype)
        exact = a.to(torch.float64) @ b.to(torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        raw_a, raw_b = a.to(where), b.to(where)
        pairs = {
            "made ready": (ops.wide_operand(raw_a), ops.wide_operand(raw_b)),
            "raw": (raw_a, raw_b),
            "raw by one made ready and turned": (raw_a, ops.wide_operand(b.mT.contiguous().to(where)).mT),
            "turned by raw": (a.mT.contiguous().to(where).mT, raw_b),
        }
        if dtype != torch.float64:
            pairs["of two dtypes"] = (raw_a.to(torch.float32), raw_b)
        for name, (left, right) in pairs.items():
            product = ops.wide_mm(left, right)
            assert product.dtype == wide, f"the product {name} of {dtype} is {product.dtype}, not {wide}"
            worst.compare(f"product {name}, {dtype}", product, exact, TOLERANCE[wide])
            into = torch.empty_like(product)
            given = ops.wide_mm(left, right, out=into)
            assert given is into, f"the product {name} into a buffer does not return the buffer"
            worst.compare(f"product {name} into a buffer, {dtype}", into, exact, TOLERANCE[wide])
    return str(worst)


def fp8_products(subject: Subject) -> str:
    """Both formats, a scale for each row and one for all, results in bf16 and fp32; NaN stays within its row."""
    ops, here = subject.device.ops, subject.where
    if "fp8" not in subject.spec.capabilities:
        assert ops.fp8.kind == "absent", f"fp8 is {ops.fp8.kind}, and the capability is not declared"
        raise NotHereError("needs the capability fp8, which is not declared")
    assert ops.fp8.kind in ("native", "emulated"), f"the capability fp8 is declared, and fp8 is {ops.fp8.kind}"
    worst = Worst()
    for left in (E4M3, E5M2):
        for scaling in ("row", "tensor"):
            a, b = (
                scaled(_random(rows, 80, seed=rows, dtype=torch.float32), dtype, scaling, 1 << 20)
                for rows, dtype in ((37, left), (48, E4M3))
            )
            exact = (a.values.double() * a.scale.double()) @ (b.values.double() * b.scale.double()).T
            left_there, right_there = (
                Scaled(values=each.values.to(here), scale=each.scale.to(here)) for each in (a, b)
            )
            for dtype in (torch.bfloat16, torch.float32):
                out = ops.scaled_mm(left_there, right_there, dtype)
                assert out.dtype == dtype, f"the product is {out.dtype}, not {dtype}"
                what = f"product of {left}, {scaling}, in {dtype}"
                # Hardware sums some products in fewer bits than fp32 has.
                worst.compare(what, out, exact, TOLERANCE[torch.bfloat16] if dtype == torch.bfloat16 else 1e-3)
    bad = torch.ones(32, 32, device=here)
    bad[3, 5] = float("nan")
    operand, ones = (scaled(x, E4M3, "row", 1 << 20) for x in (bad, torch.ones_like(bad)))
    rows = ops.scaled_mm(operand, ones, torch.bfloat16).isnan().any(1).nonzero().flatten().tolist()
    assert rows == [3], f"a NaN in row 3 is seen in rows {rows}"
    return f"{ops.fp8.kind}, {worst}"


def _soft(name: str, log_q: Tensor, p: Tensor, mass: Tensor) -> Tensor:
    """Of each pair, by the definitions of `core.ops.distillation`."""
    q = log_q.exp()
    middle = (p + q) / 2
    alpha = torch.minimum(mass[:, None] * p, q).sum(-1)
    terms = {
        "cross_entropy": lambda: -(p * log_q).sum(-1),
        "reverse_kl": lambda: (q * (log_q - p.log())).sum(-1),
        "jsd": lambda: (p * (p / middle).log() + q * (log_q - middle.log())).sum(-1) / 2,
        "tv": lambda: 1 - alpha,
        "lk_alpha": lambda: -alpha.log(),
    }
    return terms[name]()


def distillation(subject: Subject) -> str:
    """Every term, alone and with a label, of a teacher whole or with mass outside; values, acceptance, first choices
    and the gradient of the logits; without a gradient the same values."""
    worst = Worst()
    for name in SOFT_TERMS:
        for whole in (True, False):
            for with_grad in (True, False):
                _distil(subject, name, worst, whole=whole, with_grad=with_grad)
    return f"{4 * len(SOFT_TERMS)} cases, {worst}"


def _distil(subject: Subject, name: str, worst: Worst, *, whole: bool, with_grad: bool) -> None:
    pairs, rows, size, here = 12, 7, 50, subject.where
    z = 2 * _random(pairs, size, seed=1, dtype=torch.float32)
    z[3, [7, 20]] = z[3].max() + 1  # of equal ones the first
    teacher = (2 * _random(rows, size, seed=2, dtype=torch.float32)).softmax(-1)
    mass = torch.ones(rows) if whole else torch.linspace(0.4, 0.9, rows)
    row, weight = torch.tensor([*range(2, 7), *range(7)]), torch.linspace(0.2, 1.0, pairs)
    label_weight, label = torch.linspace(1.0, 0.1, pairs), torch.arange(pairs) * 3 - 3  # the first teaches nothing
    wide = z.to(torch.float64).requires_grad_()
    log_q, p, inside = wide.log_softmax(-1), teacher.to(torch.float64)[row], mass.to(torch.float64)[row]
    term = _soft(name, log_q, p, inside)
    to_label = -log_q.gather(1, label.clamp(min=0)[:, None])[:, 0] * (label >= 0)
    (wanted,) = torch.autograd.grad((weight * term + label_weight * to_label).sum(), wide)
    logits = z.clone().to(here)
    terms = subject.device.ops.distillation_tile(
        logits,
        TileTeacher(
            probs_RN=teacher.to(here),
            inside_R=None if whole else mass.to(here),
            log_probs_RN=teacher.log().to(here) if name in LOG_TERMS else None,
        ),
        TilePairs(
            row_C=row.to(here),
            runs=[(0, 5, 2), (5, 12, 0)],
            weight={name: weight.to(here)},
            labels={"label": Label(weight_C=label_weight.to(here), index_C=label.to(here))},
        ),
        with_grad=with_grad,
    )
    what = f"{name}{'' if whole else ', some mass outside'}{'' if with_grad else ', without gradient'}"
    found = {
        what: (terms.value[name], term.detach()),
        f"cross-entropy beside {what}": (terms.value["cross_entropy"], -(p * log_q).sum(-1).detach()),
        f"label beside {what}": (terms.value["label"], to_label.detach()),
        f"alpha of {what}": (terms.alpha_C, torch.minimum(inside[:, None] * p, log_q.detach().exp()).sum(-1)),
    }
    if with_grad:
        found[f"gradient of {what}"] = (logits, wanted)
    for each, (got, exact) in found.items():
        worst.compare(each, got, exact, 3 * TOLERANCE[torch.float32])
    places = torch.arange(size).where(z == z.amax(-1, keepdim=True), size)
    assert same(terms.best_C, places.amin(-1)), f"best_C is not the first of the largest logits ({what})"


OPS = (
    Check("ops: rms norm and its gradients", rms_norm),
    Check("ops: rotary positions and back", rotary),
    Check("ops: swiglu and its gradients", swiglu),
    Check("ops: products that sum in fp32", wide_products),
    Check("ops: products of FP8 matrices", fp8_products),
    Check("ops: distillation tile", distillation),
)
