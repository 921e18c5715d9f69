"""Every breach of the device contract that we know of is found: each is planted in the CPU's adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.conformance.checks import perform
from torchspec.devices.api import Device, FusedOps, MaskSpec, MemoryStats, Scaled
from torchspec.devices.conformance import CHECKS, Subject, subject_of
from torchspec.devices.cpu.ops import CpuOps

CHECK = {check.name: check for check in CHECKS}
Pair = tuple[Tensor, Tensor]
Grads = tuple[Tensor, ...]


def whole() -> Subject:
    return subject_of("cpu")


def failing(subject: Subject, *names: str) -> dict[str, str]:
    """What the checks that did not pass say."""
    results = [perform(CHECK[name], subject) for name in names]
    assert all(result.status != "SKIP" for result in results)
    return {result.check: result.text for result in results if result.status == "FAIL"}


class Broken:
    """The CPU's attention; a breach changes what goes in or what comes out."""

    temporary_bytes = 1 << 20

    def __init__(
        self,
        *,
        mask: Callable[[MaskSpec, Tensor, Tensor], MaskSpec] = lambda mask, q, k: mask,
        scale: Callable[[float, Tensor], float] = lambda scale, q: scale,
        heads: Callable[[Tensor, Tensor], Tensor] = lambda x, q: x,
        forward: Callable[[Tensor, Tensor, Tensor, Tensor], Pair] = lambda out, lse, q, k: (out, lse),
        statistics: Callable[[Tensor, Tensor, Any], Pair] = lambda out, lse, again: (out, lse),
        backward: Callable[[Grads], Grads] = lambda grads: grads,
    ) -> None:
        self.inner = whole().device.attention
        self.mask, self.scale, self.heads = mask, scale, heads
        self.results, self.statistics, self.grads = forward, statistics, backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Pair:
        told = self.mask(mask, q, k)
        out, lse = self.inner.forward(q, self.heads(k, q), self.heads(v, q), told, self.scale(scale, q))
        return self.results(out, lse, q, k)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: MaskSpec, scale: float
    ) -> Any:
        told, scale = self.mask(mask, q, k), self.scale(scale, q)
        out, lse = self.statistics(out, lse, lambda: self.inner.forward(q, k, v, told, scale))
        grads = self.inner.backward(dout, q, k, v, out.to(q.dtype), lse.to(torch.float32), told, scale)
        return self.grads(grads)


def polarity(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    return mask if mask.keep_BQS is None else MaskSpec.dense(~mask.keep_BQS)


def upper_left(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    return replace(mask, alignment="upper_left")


def wider(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    return replace(mask, window=mask.window + 1) if mask.kind == "window" else mask


def inclusive(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    if mask.key_start_BQ is None or mask.key_end_BQ is None:
        return mask
    return MaskSpec.limits(mask.key_start_BQ, mask.key_end_BQ + 1)


def nothing_masked(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    return MaskSpec.full() if mask.kind == "causal" else mask


def squared(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    return MaskSpec.dense(mask.to_dense(q.shape[1], k.shape[1], q.device)) if mask.kind != "full" else mask


def interleaved(x: Tensor, q: Tensor) -> Tensor:
    """Query head h meets key head h % K."""
    group = q.shape[2] // x.shape[2]
    return x.repeat(1, 1, group, 1)


def marked(value: float) -> Callable[..., Pair]:
    return lambda out, lse, q, k: (out, lse.masked_fill(lse == -math.inf, value))


def not_a_number(out: Tensor, lse: Tensor, q: Tensor, k: Tensor) -> Pair:
    return out.masked_fill((lse == -math.inf).transpose(1, 2)[..., None], math.nan), lse


def changed_input(out: Tensor, lse: Tensor, q: Tensor, k: Tensor) -> Pair:
    if q.stride(-1) == 1:
        q.mul_(1.0001)
    return out, lse


def overflowing(out: Tensor, lse: Tensor, q: Tensor, k: Tensor) -> Pair:
    """A softmax that does not take the largest score off first."""
    return out, lse.exp().log()


def never_empty(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskSpec:
    """But for intervals that begin at 0."""
    start, end = mask.key_start_BQ, mask.key_end_BQ
    if start is None or end is None:
        return mask
    return MaskSpec.limits(start, torch.where((start == end) & (start > 0), end + 1, end))


class Simple(Broken):
    """Believes that what it is given is its own, unless the mask is dense or has limits."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: MaskSpec, scale: float
    ) -> Any:
        if mask.kind in ("full", "causal", "window"):
            out, lse = self.inner.forward(q, k, v, mask, scale)
        return super().backward(dout, q, k, v, out, lse, mask, scale)


MASKS, EMPTY = "attention: every kind of mask", "attention: rows without keys"
ATTENTION = {
    "mask polarity flipped": (Broken(mask=polarity), MASKS),
    "causal aligned upper left": (Broken(mask=upper_left), MASKS),
    "causal mask left out": (Broken(mask=nothing_masked), MASKS),
    "window one key too wide": (Broken(mask=wider), MASKS),
    "limits inclusive": (Broken(mask=inclusive), MASKS),
    "scale left at 1": (Broken(scale=lambda scale, q: 1.0), MASKS),
    "scale left at its default": (Broken(scale=lambda scale, q: q.shape[-1] ** -0.5), MASKS),
    "lse of shape [B, Q, H]": (Broken(forward=lambda out, lse, q, k: (out, lse.mT.contiguous())), MASKS),
    "lse of shape [B, H, Q, 1]": (Broken(forward=lambda out, lse, q, k: (out, lse[..., None])), MASKS),
    "lse padded": (Broken(forward=lambda out, lse, q, k: (out, torch.nn.functional.pad(lse, (0, 3)))), MASKS),
    "lse strided": (Broken(forward=lambda out, lse, q, k: (out, lse.mT.contiguous().mT)), MASKS),
    "lse to base 2": (Broken(forward=lambda out, lse, q, k: (out, lse / math.log(2))), MASKS),
    "lse in bf16": (Broken(forward=lambda out, lse, q, k: (out, lse.bfloat16())), MASKS),
    "wrong return index: out for lse": (
        Broken(forward=lambda out, lse, q, k: (out, out[..., 0].mT.contiguous())),
        MASKS,
    ),
    "wrong return index: dk and dv": (Broken(backward=lambda g: (g[0], g[2], g[1])), MASKS),
    "five gradients": (Broken(backward=lambda g: (*g, g[0], g[0])), MASKS),
    "gradients in fp32": (Broken(backward=lambda g: tuple(x.float() for x in g)), "attention: declared dtypes"),
    "out in fp32": (Broken(forward=lambda out, lse, q, k: (out.float(), lse)), "attention: declared dtypes"),
    "heads met in turn": (Broken(heads=interleaved), "attention: grouped query heads"),
    "lse 0 without keys": (Broken(forward=marked(0.0)), EMPTY),
    "lse +inf without keys": (Broken(forward=marked(math.inf)), EMPTY),
    "out not a number without keys": (Broken(forward=not_a_number), EMPTY),
    "own lse in the backward": (
        Broken(statistics=lambda out, lse, again: again()),
        "attention: shares of the keys, merged",
    ),
    "own out in the backward": (
        Broken(statistics=lambda out, lse, again: (again()[0], lse)),
        "attention: shares of the keys, merged",
    ),
    "own lse in the backward, where the mask is simple": (Simple(), "attention: shares under every mask"),
    "a key where a row's interval is empty": (Broken(mask=never_empty), EMPTY),
    "inputs changed": (Broken(forward=changed_input), "attention: inputs of any layout"),
    "exponentials overflow": (Broken(forward=overflowing), "attention: large scores"),
    "a square of scores": (Broken(mask=squared), "attention: no square of the sequence"),
    "noise": (
        Broken(backward=lambda g: (g[0] * (1 + 1e-6 * torch.rand(())), *g[1:])),
        "attention: deterministic if asked to be",
    ),
}


@pytest.mark.parametrize("breach", ATTENTION)
def test_attention(breach: str) -> None:
    attention, check = ATTENTION[breach]
    subject = whole()
    broken = replace(subject, device=replace(subject.device, attention=attention))
    if breach == "a square of scores":  # the CPU's own tiles would cut it: as a device would that takes any mask
        attention.inner = Square()
    assert check in failing(broken, check)


class Square:
    """Attention that works on the whole matrix of scores."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Pair:
        keep_BQS = mask.to_dense(q.shape[1], k.shape[1], q.device)
        scores = torch.einsum("bqhd,bshd->bhqs", q, k) * scale
        scores = scores.masked_fill(~keep_BQS[:, None], -math.inf)
        return torch.einsum("bhqs,bshd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Grads:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


class NoEps(FusedOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Pair:
        return super().rms_norm(x, weight, 1e-6)


class NoWeight(FusedOps):
    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, kept: Tensor) -> Pair:
        return super().rms_norm_backward(dy, x, torch.ones_like(weight), kept)


class Interleaved(FusedOps):
    def rotary(self, x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
        turned = torch.stack([-x_BSHD[..., 1::2], x_BSHD[..., ::2]], dim=-1).flatten(-2)
        return x_BSHD * cos_BSD[:, :, None] + turned * sin_BSD[:, :, None]


class Swapped(FusedOps):
    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().swiglu(up, gate)


class SwappedGradients(FusedOps):
    def swiglu_backward(self, dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        again, dgate, dup = super().swiglu_backward(dout, gate, up)
        return again, dup, dgate


class Rounded(FusedOps):
    def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        product = super().wide_mm(a, b, out)
        return product.copy_(product.bfloat16())


class Negligent(FusedOps):
    """Knows a teacher whose vocabulary is whole."""

    def distillation_tile(self, logits_CN: Tensor, teacher: Any, pairs: Any, *, with_grad: bool) -> Any:
        return super().distillation_tile(logits_CN, replace(teacher, inside_R=None), pairs, with_grad=with_grad)


class Bufferless(FusedOps):
    def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Any:
        product = super().wide_mm(a, b, out)
        return product if out is None else None


class Fp8(FusedOps):
    """Without FP8, on a device that declares it."""


class Unscaled(CpuOps):
    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        return super().scaled_mm(replace(a, scale=torch.ones_like(a.scale)), b, dtype)


class Saturated(CpuOps):
    """NaN becomes a number."""

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        return super().scaled_mm(a, b, dtype).nan_to_num_()


class LastChoice(FusedOps):
    def distillation_tile(self, logits_CN: Tensor, teacher: Any, pairs: Any, *, with_grad: bool) -> Any:
        terms = super().distillation_tile(logits_CN, teacher, pairs, with_grad=with_grad)
        return replace(terms, best_C=terms.best_C + 1)


@pytest.mark.parametrize(
    ("ops", "check"),
    [
        (NoEps(), "ops: rms norm and its gradients"),
        (NoWeight(), "ops: rms norm and its gradients"),
        (Interleaved(), "ops: rotary positions and back"),
        (Swapped(), "ops: swiglu and its gradients"),
        (SwappedGradients(), "ops: swiglu and its gradients"),
        (Rounded(), "ops: products that sum in fp32"),
        (Bufferless(), "ops: products that sum in fp32"),
        (Fp8(), "ops: products of FP8 matrices"),
        (Unscaled(), "ops: products of FP8 matrices"),
        (Saturated(), "ops: products of FP8 matrices"),
        (Negligent(), "ops: distillation tile"),
        (LastChoice(), "ops: distillation tile"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_ops(ops: FusedOps, check: str) -> None:
    subject = whole()
    assert check in failing(replace(subject, device=replace(subject.device, ops=ops)), check)


class Instead:
    """A thing of the CPU's, some of whose methods are others."""

    def __init__(self, inner: Any, **others: Any) -> None:
        self.inner = inner
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


STATS = MemoryStats(allocated=1 << 30, peak=1 << 30, total=1 << 40)


@pytest.mark.parametrize(
    ("breach", "check"),
    [
        ({"manual_seed": lambda seed: None}, "runtime: random state"),
        ({"manual_seed": lambda seed: torch.manual_seed(3)}, "runtime: random state"),
        ({"set_rng_state": lambda state: torch.manual_seed(3)}, "runtime: random state"),
        ({"memory": lambda: STATS}, "runtime: memory accounting"),
        ({"upload": lambda tensors: lambda: list(tensors)[::-1]}, "runtime: uploads beside work"),
        ({"upload": lambda tensors: lambda: [t.float() for t in tensors]}, "runtime: uploads beside work"),
        ({"upload": lambda tensors: lambda: [t[..., :0] for t in tensors]}, "runtime: large uploads from a thread"),
        ({"profile": lambda directory: nullcontext()}, "runtime: a profile"),
        ({"device_type": "other"}, "spec: what is declared"),
        ({"device_count": lambda: 0}, "runtime: binding"),
        ({"bind": lambda rank: torch.device("meta")}, "runtime: binding"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_runtime(breach: dict[str, Any], check: str) -> None:
    subject = whole()
    device = replace(subject.device, runtime=Instead(subject.device.runtime, **breach))
    assert check in failing(replace(subject, device=device), check)


def test_capabilities_that_mean_nothing() -> None:
    subject = whole()
    spec = replace(subject.spec, capabilities=frozenset({"bfloat16"}))
    assert "['bfloat16'] mean nothing" in failing(replace(subject, spec=spec), "spec: what is declared").popitem()[1]


def shares(device: Device, **others: Any) -> Device:
    return replace(device, shared_memory=Instead(device.shared_memory, **others))


@pytest.mark.parametrize("breach", ["a copy", "a file left behind", "memory of nothing"])
def test_sharing(breach: str, tmp_path: Path) -> None:
    subject = whole()
    memory = subject.device.shared_memory
    assert memory is not None

    def copied(nbytes: int, directory: Path) -> tuple[Tensor, str]:
        held_U, handle = memory.allocate(nbytes, directory)
        return held_U.clone(), handle

    def anything(handle: str) -> Tensor:
        return memory.open(handle) if Path(handle).exists() else torch.zeros(8, dtype=torch.uint8)

    others = {
        "a copy": {"allocate": copied},
        "a file left behind": {"release": lambda handle: None},
        "memory of nothing": {"open": anything},
    }[breach]
    check = "sharing: with another process"
    assert check in failing(replace(subject, device=shares(subject.device, **others)), check)
