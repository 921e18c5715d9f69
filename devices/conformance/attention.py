"""Checks of `Attention`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.conformance.checks import Check
from torchspec.core.ops.lse import merge
from torchspec.devices.api import MaskSpec
from torchspec.devices.conformance.oracle import BATCH, Case, Exact, attention, masked, solved
from torchspec.devices.conformance.subject import TOLERANCE, Subject, Worst

SHAPES = ((37, 37), (70, 130), (130, 70))


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def placed(mask: MaskSpec, where: torch.device, *, limits: bool = False) -> MaskSpec:
    """A dense mask lies on the device; limits stay on the host, where attention is planned, but may lie there, too."""
    if limits and mask.key_start_BQ is not None and mask.key_end_BQ is not None:
        return MaskSpec.limits(mask.key_start_BQ.to(where), mask.key_end_BQ.to(where))
    return mask if mask.keep_BQS is None else replace(mask, keep_BQS=mask.keep_BQS.to(where))


def compare(
    subject: Subject, case: Case, tensors: tuple[Tensor, ...], mask: MaskSpec, exact: Exact, worst: Worst
) -> None:
    """`tensors` q, k, v, dout lie on the device."""
    q, k, v, dout = tensors
    tolerance = TOLERANCE[case.dtype]
    pair = subject.device.attention
    out, lse = pair.forward(q, k, v, mask, case.scale)
    _check_form(case, out, lse, exact)
    empty = exact.empty_BHQ
    assert not bool(out.cpu()[empty.transpose(1, 2)].any()), f"rows without keys have an output ({case})"
    worst.compare(f"out, {case}", out, exact.out_BQHD, tolerance)
    worst.compare(f"lse, {case}", lse.cpu().masked_fill(empty, 0), exact.lse_BHQ.masked_fill(empty, 0), tolerance)
    grads = pair.backward(dout, q, k, v, out, lse, mask, case.scale)
    assert len(grads) == 3, f"backward returns {len(grads)} tensors, not dq, dk, dv"
    for name, grad, want, like in zip(("dq", "dk", "dv"), grads, exact.grads, (q, k, v), strict=True):
        assert grad.dtype == like.dtype, f"{name} is {grad.dtype}, not {like.dtype} ({case})"
        assert grad.device == like.device, f"{name} lies on {grad.device}"
        worst.compare(f"{name}, {case}", grad, want, tolerance)


def _check_form(case: Case, out: Tensor, lse: Tensor, exact: Exact) -> None:
    wanted = tuple(exact.lse_BHQ.shape)
    assert out.dtype == case.dtype, f"out is {out.dtype}, not {case.dtype}"
    assert out.shape == exact.out_BQHD.shape, f"out has shape {tuple(out.shape)} ({case})"
    assert tuple(lse.shape) == wanted, f"lse has shape {tuple(lse.shape)}, not [B, Hq, Q] = {list(wanted)} ({case})"
    assert lse.dtype == _statistics(case.dtype), f"lse is {lse.dtype}, not {_statistics(case.dtype)}"
    assert lse.is_contiguous(), f"lse is not contiguous ({case})"
    marked = lse.cpu() == -torch.inf
    assert torch.equal(marked, exact.empty_BHQ), f"lse is -inf in other rows than those without keys ({case})"


def run(subject: Subject, cases: Iterable[Case]) -> str:
    worst = Worst()
    listed = list(cases)
    for case in listed:
        tensors = tuple(x.to(subject.where) for x in case.tensors())
        mask = placed(masked(case)[0], subject.where, limits=case.mask.endswith("on device"))
        compare(subject, case, tensors, mask, solved(case), worst)
    return f"{len(listed)} cases, {worst}"


def masks(subject: Subject) -> str:
    names = ["full", "causal:upper_left", "causal:lower_right"]
    names += [f"window:{width},{alignment}" for width in (1, 5, 1000) for alignment in ("upper_left", "lower_right")]
    names += ["limits:padded", "limits:packed", "limits:packed int32", "limits:packed on device", "limits:blocks"]
    names += ["dense:shared", "dense:each"]
    return run(subject, (Case(mask=name, queries=q, keys=s) for name in names for q, s in SHAPES))


def grouped_heads(subject: Subject) -> str:
    names = ("full", "causal:lower_right", "limits:packed", "dense:each")
    heads = ((4, 2), (6, 3), (8, 1))
    return run(subject, (Case(mask=name, queries=50, keys=70, heads=h) for name in names for h in heads))


def head_sizes(subject: Subject) -> str:
    names = ("causal:upper_left", "dense:each")
    sizes = (8, 20, 80, 128, 256)
    return run(subject, (Case(mask=name, queries=40, keys=40, size=size) for name in names for size in sizes))


def rows_without_keys(subject: Subject) -> str:
    cases = [Case(mask=name, queries=90, keys=90) for name in ("limits:late", "limits:nonzero empty", "dense:empty")]
    cases += [
        Case(mask="causal:lower_right", queries=60, keys=20),
        Case(mask="window:3,upper_left", queries=60, keys=20),
    ]
    return run(subject, [*cases, *(replace(case, heads=(4, 2)) for case in cases)])


def long_sequences(subject: Subject) -> str:
    """More rows than any tile of the planner or block of a kernel."""
    names = ("causal:upper_left", "window:70,upper_left", "limits:packed", "limits:blocks")
    return run(subject, (Case(mask=name, queries=700, keys=700, size=32) for name in names))


def few_rows(subject: Subject) -> str:
    """One query, as in decoding; no query; no key."""
    shapes = ((1, 33), (1, 1), (0, 5), (5, 0))
    names = ("full", "causal:lower_right")
    return run(subject, (Case(mask=name, queries=q, keys=s, heads=(4, 2)) for name in names for q, s in shapes))


def dtypes(subject: Subject) -> str:
    names = ("full", "causal:lower_right", "limits:packed", "limits:late", "dense:each", "window:5,lower_right")
    wanted = [dtype for dtype in subject.dtypes if dtype != torch.float32]
    cases = (Case(mask=n, queries=70, keys=90, heads=(4, 2), dtype=dtype) for dtype in wanted for n in names)
    return run(subject, cases) if wanted else "only fp32 is declared"


def large_scores(subject: Subject) -> str:
    """Scores of some hundreds, whose exponentials fp32 cannot hold."""
    names = ("full", "causal:upper_left", "dense:each")
    worst = Worst()
    for name in names:
        case = Case(mask=name, queries=40, keys=40, scale=4.0)
        q, k, v, dout = case.tensors()
        mask, keep_BQS = masked(case)
        exact = attention(q, k, v, dout, keep_BQS, case.scale)
        q, k, v = (x.to(subject.where) for x in (q, k, v))
        out, lse = subject.device.attention.forward(q, k, v, placed(mask, subject.where), case.scale)
        worst.compare(f"out, {case}", out, exact.out_BQHD, 1e-3)  # a score of 100 has an error of 1e-5 in fp32
        worst.compare(f"lse, {case}", lse, exact.lse_BHQ, 1e-5)
    return str(worst)


def shares(subject: Subject) -> str:
    """Two parts of the keys, each with the merged result of both: what a ring of devices does."""
    worst = Worst()
    for dtype in subject.dtypes:
        case = Case(mask="full", queries=40, keys=64, heads=(4, 2), dtype=dtype)
        q, k, v, dout = case.tensors()
        cut = 24
        first = torch.ones(1, 40, cut, dtype=torch.bool)
        first[:, [3, 7]] = False
        ends = torch.tensor(
            [[0 if i == 3 else i + 1 for i in range(40)]]
        )  # row 3 keeps nothing, row 7 none of the first
        second = torch.arange(64 - cut)[None, None] < ends[..., None]
        exact = attention(q, k, v, dout, torch.cat([first, second], dim=-1).expand(BATCH, -1, -1), case.scale)
        parts = (
            (placed(MaskSpec.dense(first), subject.where), slice(0, cut)),
            (MaskSpec.limits(torch.zeros_like(ends), ends), slice(cut, 64)),
        )
        q, k, v, dout = (x.to(subject.where) for x in (q, k, v, dout))
        pair = subject.device.attention
        results = [pair.forward(q, k[:, keys], v[:, keys], mask, case.scale) for mask, keys in parts]
        out, lse = merge(*results[0], *results[1])
        worst.compare(f"merged out, {dtype}", out, exact.out_BQHD, TOLERANCE[dtype])
        marked = lse.cpu() == -torch.inf
        assert torch.equal(marked, exact.empty_BHQ), "the merged lse is -inf in other rows than those without keys"
        shown = (lse.cpu().masked_fill(marked, 0), exact.lse_BHQ.masked_fill(marked, 0))
        worst.compare(f"merged lse, {dtype}", *shown, TOLERANCE[dtype])
        grads = [
            pair.backward(dout, q, k[:, keys], v[:, keys], out.to(dtype), lse, mask, case.scale) for mask, keys in parts
        ]
        summed = grads[0][0].cpu().to(torch.float64) + grads[1][0].cpu()
        sums = [summed, *(torch.cat([grad[n].cpu() for grad in grads], dim=1) for n in (1, 2))]
        for name, got, want in zip(("dq", "dk", "dv"), sums, exact.grads, strict=True):
            worst.compare(f"{name} of the shares, {dtype}", got, want, TOLERANCE[dtype])
    return str(worst)


def shares_of_every_mask(subject: Subject) -> str:
    """Each mask's keys beside others that every row sees; the merged result must reach the gradients of both."""
    worst = Worst()
    names = ("full", "causal:upper_left", "causal:lower_right", "window:5,lower_right", "limits:packed", "dense:each")
    for name in names:
        case = Case(mask=name, queries=40, keys=52, heads=(4, 2))
        q, k, v, dout = case.tensors()
        _, more_k, more_v, _ = replace(case, keys=20).tensors()
        mask, keep_BQS = masked(case)
        kept = torch.cat([keep_BQS, torch.ones(BATCH, 40, 20, dtype=torch.bool)], dim=-1)
        exact = attention(q, torch.cat([k, more_k], 1), torch.cat([v, more_v], 1), dout, kept, case.scale)
        q, dout = q.to(subject.where), dout.to(subject.where)
        parts = [
            (k.to(subject.where), v.to(subject.where), placed(mask, subject.where)),
            (more_k.to(subject.where), more_v.to(subject.where), MaskSpec.full()),
        ]
        pair = subject.device.attention
        (out, lse), (more_out, more_lse) = (pair.forward(q, k, v, m, case.scale) for k, v, m in parts)
        out, lse = merge(out, lse, more_out, more_lse)
        grads = [pair.backward(dout, q, k, v, out.to(q.dtype), lse, m, case.scale) for k, v, m in parts]
        worst.compare(f"dq, {case} beside others", grads[0][0] + grads[1][0], exact.grads[0], TOLERANCE[case.dtype])
        for n, what in ((1, "dk"), (2, "dv")):
            got = torch.cat([grad[n] for grad in grads], dim=1)
            worst.compare(f"{what}, {case} beside others", got, exact.grads[n], TOLERANCE[case.dtype])
    return f"{len(names)} kinds of mask, {worst}"


def any_layout(subject: Subject) -> str:
    """Strided and expanded inputs, which stay as they are."""
    worst = Worst()
    for mask in ("causal:lower_right", "dense:each"):
        case = Case(mask=mask, queries=40, keys=52, heads=(4, 2))
        exact = solved(case)
        spec = placed(masked(case)[0], subject.where)
        contiguous = tuple(x.to(subject.where) for x in case.tensors())
        heads_first = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in contiguous)
        size_second = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in contiguous)
        padded = tuple(torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in contiguous)
        for tensors in (heads_first, size_second, padded):
            kept = [x.clone() for x in tensors]
            compare(subject, case, tensors, spec, exact, worst)
            assert all(map(torch.equal, tensors, kept)), f"inputs were changed ({case})"
        q, k, v, dout = case.tensors()
        ones = torch.ones((), dtype=dout.dtype).expand_as(dout)
        expanded = (*contiguous[:3], torch.ones((), dtype=dout.dtype, device=subject.where).expand_as(contiguous[3]))
        compare(subject, case, expanded, spec, attention(q, k, v, ones, masked(case)[1], case.scale), worst)
    return str(worst)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest number of elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


def no_square(subject: Subject) -> str:
    """No operator gives out a matrix of scores of the whole sequence. What a kernel keeps to itself is not seen."""
    rows, size, largest = 2048, 8, 0
    case = Case(mask="causal:upper_left", queries=rows, keys=rows, heads=(1, 1), size=size)
    q, k, v, dout = (x.to(subject.where) for x in case.tensors())
    masks = (MaskSpec.causal(), MaskSpec.sliding(64), MaskSpec.limits(*_documents(rows)))
    for mask in masks:
        with _Largest() as seen:
            out, lse = subject.device.attention.forward(q, k, v, mask, case.scale)
            subject.device.attention.backward(dout, q, k, v, out, lse, mask, case.scale)
        assert seen.elements < BATCH * rows * rows / 3, f"a tensor of {seen.elements} elements under a {mask.kind} mask"
        largest = max(largest, seen.elements)
    return f"at most {largest} elements at {rows} rows; a square of scores has {BATCH * rows * rows}"


def _documents(rows: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows)[None]
    return row // 300 * 300, row + 1


def deterministic(subject: Subject) -> str:
    """Where deterministic algorithms are asked for, the same bits again, or PyTorch's error that there are none."""
    case = Case(mask="causal:upper_left", queries=300, keys=300, heads=(4, 2), dtype=subject.dtypes[-1])
    q, k, v, dout = (x.to(subject.where) for x in case.tensors())
    pair, mask = subject.device.attention, masked(case)[0]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out, lse = pair.forward(q, k, v, mask, case.scale)
            runs.append([out, lse, *pair.backward(dout, q, k, v, out, lse, mask, case.scale)])
    except RuntimeError as refused:
        if "determin" not in str(refused):
            raise
        return "refused, as PyTorch does where there is no deterministic kernel"
    finally:
        torch.use_deterministic_algorithms(before)
    for again in runs[1:]:
        equal = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(runs[0], again, strict=True))
        assert equal, "other bits the second time"
    return "three runs, equal bits"


ATTENTION = (
    Check("attention: every kind of mask", masks),
    Check("attention: grouped query heads", grouped_heads),
    Check("attention: head sizes", head_sizes),
    Check("attention: rows without keys", rows_without_keys),
    Check("attention: long sequences", long_sequences),
    Check("attention: one row, no row, no key", few_rows),
    Check("attention: declared dtypes", dtypes),
    Check("attention: large scores", large_scores),
    Check("attention: shares of the keys, merged", shares),
    Check("attention: shares under every mask", shares_of_every_mask),
    Check("attention: inputs of any layout", any_layout),
    Check("attention: no square of the sequence", no_square),
    Check("attention: deterministic if asked to be", deterministic),
)
