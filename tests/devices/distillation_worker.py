"""Compares the fused distillation tile with the portable form, case by case; run by test_cuda_ops.py.

    TRITON_INTERPRET=1 distillation_worker.py cpu
    distillation_worker.py cuda
    distillation_worker.py compile

Prints the failures and how many cases there were, or the architectures that it was compiled for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchspec.core.ops.distillation import SOFT_TERMS, Label, TilePairs, TileTeacher, TileTerms, distillation_tile
from torchspec.devices.cuda import _distillation_triton as fused

ROWS = (2, 0, 2, 1, 0)  # of the teacher: shared, and in no order
TEACHERS = 3

# fp32 rounds each sum at 6e-8 of its largest part; beyond that the kernel may err as much as the portable form in fp32
# does, a few times: it adds in another order, and exp and log of a GPU are off by more than one rounding.
ROUNDING = 2e-6
ABSOLUTE = 2e-7  # weights and probabilities are of order 1: what their differences leave where they should cancel
SLACK = 4.0

Logits = Literal["random", "saturated", "equal", "ties", "half_tied"]


@dataclass(frozen=True, kw_only=True)
class Case:
    size: int
    terms: tuple[str, ...] = ("cross_entropy",)
    labels: int = 0
    logits: Logits = "random"
    inside: Literal["whole", "part", "none_of_one"] = "part"
    excluded: bool = False  # the teacher gives some tokens no probability
    weightless: bool = False
    with_grad: bool = True
    padding: int = 0  # between the rows in memory
    pairs: int = len(ROWS)


def cases() -> Iterator[Case]:
    every = tuple(SOFT_TERMS)
    for size, terms in itertools.product((1, 100, 128, 1000, 5000), [*((term,) for term in every), every]):
        yield Case(size=size, terms=terms)
        yield Case(size=size, terms=terms, labels=2)
    yield Case(size=5000, terms=(), labels=1)
    for terms, inside in itertools.product([("cross_entropy",), every], ("whole", "none_of_one")):
        yield Case(size=1000, terms=terms, inside=inside)
    for logits, terms in itertools.product(
        ("saturated", "equal", "ties"), [("cross_entropy",), *((t,) for t in every)]
    ):
        yield Case(size=5000, terms=terms, logits=logits, labels=1)
    for terms in (("tv",), ("lk_alpha",), ("tv", "lk_alpha", "cross_entropy")):
        yield Case(size=128, terms=terms, logits="half_tied", inside="whole")
    yield Case(size=1000, terms=("jsd", "cross_entropy"), excluded=True)
    for terms in (("cross_entropy",), every):
        yield Case(size=1000, terms=terms, weightless=True, labels=1)
        yield Case(size=5000, terms=terms, with_grad=False, labels=2)
        yield Case(size=1000, terms=terms, padding=24)
        yield Case(size=100, terms=terms, pairs=0)
    yield Case(size=50, terms=every, labels=2, padding=(1 << 30) + 1)  # a row past 2**31 elements; 8.6 GB of a GPU


@dataclass(frozen=True, kw_only=True)
class Problem:
    logits_CN: Tensor
    teacher: TileTeacher
    pairs: TilePairs

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, dtype)

        source, pairs = self.teacher, self.pairs
        return Problem(
            logits_CN=self.logits_CN.to(device, dtype),
            teacher=TileTeacher(
                probs_RN=source.probs_RN.to(device, dtype),
                inside_R=moved(source.inside_R),
                log_probs_RN=moved(source.log_probs_RN),
            ),
            pairs=TilePairs(
                row_C=pairs.row_C.to(device),
                runs=pairs.runs,
                weight={name: weight_C.to(device, dtype) for name, weight_C in pairs.weight.items()},
                labels={
                    name: Label(weight_C=label.weight_C.to(device, dtype), index_C=label.index_C.to(device))
                    for name, label in pairs.labels.items()
                },
            ),
        )


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.size + 7 * len(case.terms) + case.labels)
    rows = (ROWS if case.padding < 1 << 20 else (2, 0, 1))[: case.pairs]
    logits_CN = make_logits(case, len(rows), generator)
    raw_RN = 2 * torch.randn(TEACHERS, case.size, generator=generator)
    if case.excluded:
        raw_RN[:, ::3] = -math.inf
    probs_RN, log_probs_RN = raw_RN.softmax(-1), raw_RN.log_softmax(-1)
    if case.logits == "half_tied":
        probs_RN = half_tied_teacher(case.size)
    inside_R = None if case.inside == "whole" else torch.tensor([0.9, 0.3, 0.6])
    if case.inside == "none_of_one":
        inside_R = torch.tensor([0.9, 0.0, 0.6])
    weight = {term: torch.rand(len(rows), generator=generator) for term in case.terms}
    labels = {}
    for number in range(case.labels):
        index_C = torch.randint(0, case.size, (len(rows),), generator=generator)
        index_C[number + 1 :: 4] = -1
        labels[f"label{number}"] = Label(weight_C=torch.rand(len(rows), generator=generator), index_C=index_C)
    if case.weightless:
        weight = {term: torch.zeros_like(weight_C) for term, weight_C in weight.items()}
        labels = {name: Label(weight_C=torch.zeros(len(rows)), index_C=x.index_C) for name, x in labels.items()}
    pairs = TilePairs(
        row_C=torch.tensor(rows, dtype=torch.int64),
        runs=[(pair, pair + 1, row) for pair, row in enumerate(rows)],
        weight=weight,
        labels=labels,
    )
    teacher = TileTeacher(probs_RN=probs_RN, inside_R=inside_R, log_probs_RN=log_probs_RN)
    return Problem(logits_CN=logits_CN, teacher=teacher, pairs=pairs)


def make_logits(case: Case, pairs: int, generator: torch.Generator) -> Tensor:
    size = case.size
    if case.logits == "equal":
        return torch.full((pairs, size), 0.25)
    logits_CN = 3 * torch.randn(pairs, size, generator=generator)
    if case.logits == "saturated":
        side_CN = torch.randint(-1, 2, (pairs, size), generator=generator)
        return torch.where(side_CN == 0, logits_CN, 1e4 * side_CN)
    if case.logits == "ties":
        for pair in range(pairs):  # one place of two blocks, a lower place of a later block, and the end
            first = 1500 + 10 * pair
            logits_CN[pair, [first, first + fused.BLOCK, fused.BLOCK + 10, size - 1 - pair]] = 20.0
    if case.logits == "half_tied":
        logits_CN[:, : size // 2] = 0.0
        logits_CN[:, size // 2 :] = -1e4
    return logits_CN


def half_tied_teacher(size: int) -> Tensor:
    """With q = 2 / size on the first half of the tokens and 0 elsewhere: f = q on a quarter, exactly, and f = q / 2 on
    the next quarter."""
    probs_RN = torch.full((TEACHERS, size), 0.5 / size)
    probs_RN[:, : size // 4] = 2 / size
    probs_RN[:, size // 4 : size // 2] = 1 / size
    return probs_RN


def apart(x_CN: Tensor, padding: int) -> Tensor:
    """x with its rows `padding` elements apart in memory."""
    pairs, size = x_CN.shape
    room = x_CN.new_empty(max(0, pairs - 1) * (size + padding) + size)  # on the CPU, only what is touched costs memory
    return room.as_strided((pairs, size), (size + padding, 1)).copy_(x_CN)


def portable(source: Problem, with_grad: bool) -> tuple[TileTerms, Tensor]:
    logits_CN = source.logits_CN.clone()
    terms = distillation_tile(logits_CN, source.teacher, source.pairs, with_grad=with_grad, temporary_bytes=1 << 16)
    return terms, logits_CN


def failures(case: Case, device: torch.device) -> Iterator[str]:
    source = problem(case)
    exact, exact_grad_CN = portable(source.to(torch.device("cpu"), torch.float64), case.with_grad)
    rounded, rounded_grad_CN = portable(source, case.with_grad)
    given = source.to(device, torch.float32)
    logits_CN = apart(given.logits_CN, case.padding)
    pairs = dataclasses.replace(given.pairs, runs=())  # the kernel must do without
    got = fused.distillation_tile(logits_CN, given.teacher, pairs, with_grad=case.with_grad)
    if list(got.value) != list(rounded.value):
        yield f"terms {list(got.value)}"
    if not torch.equal(got.best_C.cpu(), exact.best_C):
        yield f"first choices {got.best_C.tolist()}, not {exact.best_C.tolist()}"
    if case.weightless and logits_CN.any():
        yield "a gradient without weights"
    triples = {name: (got.value[name], rounded.value[name], exact.value[name]) for name in rounded.value}
    if "lk_alpha" in triples:  # -log of the smallest number of a precision: comparable within the precision alone
        got_C, rounded_C, exact_C = triples["lk_alpha"]
        triples["lk_alpha"] = got_C, rounded_C, exact_C.where(exact.alpha_C > 0, rounded_C.double())
    triples["alpha"] = (got.alpha_C, rounded.alpha_C, exact.alpha_C)
    if case.with_grad:
        triples["gradient"] = (logits_CN, rounded_grad_CN, exact_grad_CN)
    for name, (got_x, rounded_x, exact_x) in triples.items():
        if got_x.numel():
            yield from differences(name, got_x.cpu(), rounded_x, exact_x)


def differences(name: str, got: Tensor, rounded: Tensor, exact: Tensor) -> Iterator[str]:
    if got.dtype != torch.float32 or got.shape != exact.shape or not exact.isfinite().all():
        yield f"{name}: {got.dtype} {tuple(got.shape)}, or an oracle that is not finite"
        return
    allowed = ABSOLUTE + ROUNDING * exact.abs().max() + SLACK * (rounded.double() - exact).abs().max()
    for against, reference in (("fp64", exact), ("fp32", rounded.double())):
        error = (got.double() - reference).abs().max()
        if not error <= allowed:
            yield f"{name}: off by {error:.1e} from {against}, allowed {allowed:.1e}"


FLAGS = ("INSIDE", "OVERLAP", "REVERSE", "JSD", "GRADIENT")
STRIDES = ("logits_stride", "probs_stride", "log_probs_stride")


def compile_for(capability: int, constants: dict[str, int], stride_type: str) -> None:
    """The whole way to machine code."""
    names = fused._pair.arg_names
    types = {"row_ptr": "*i64", "best_ptr": "*i64", "count": "i32", "size": "i32"}
    types |= dict.fromkeys(STRIDES, stride_type) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fused._pair,
        signature={name: types.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fused.WARPS})
    assert compiled.asm["cubin"]


def compile_all() -> None:
    """The widest kernel; the default objective with strides past 2**31; one token, which Triton takes for a constant,
    as it does each 1."""
    for capability in (75, 80, 90):
        compile_for(capability, dict.fromkeys(FLAGS, 1) | {"BLOCK": fused.BLOCK}, "i32")
        compile_for(capability, dict.fromkeys(FLAGS, 0) | {"GRADIENT": 1, "BLOCK": fused.BLOCK}, "i64")
        compile_for(capability, dict.fromkeys((*FLAGS, "size", "BLOCK", *STRIDES), 1), "i32")
        print(f"sm_{capability}")


def compare_all(device: torch.device) -> None:
    found = [f"{case}: {failure}" for case in cases() for failure in failures(case, device)]
    print(*found, f"{len(list(cases()))} cases, {len(found)} failures", sep="\n")
    sys.exit(len(found) > 0)


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_all()
    else:
        compare_all(torch.device(sys.argv[1]))
