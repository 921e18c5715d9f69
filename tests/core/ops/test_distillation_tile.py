"""The tile of terms, metrics and gradients against the definitions, number by number in float64.

A term is written once, as sums over scalars that autograd follows; nothing of it knows of tiles or closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from torchspec.core.ops.distillation import SOFT_TERMS, Label, TilePairs, TileTeacher, TileTerms, distillation_tile

SIZE = 7
RUNS = ((0, 3, 0), (3, 5, 1), (5, 6, 2))
ROWS = (0, 1, 2, 1, 2, 2)
TWO_ROWS = 2 * SIZE * 8
MIX = ("cross_entropy", "reverse_kl", "jsd", "tv", "lk_alpha")

Scalars = list[Tensor]


def softmax(z: Scalars) -> Scalars:
    largest = max(float(x.detach()) for x in z)
    powers = [torch.exp(x - largest) for x in z]
    total = sum(powers[1:], powers[0])
    return [power / total for power in powers]


def plus(parts: Scalars) -> Tensor:
    return sum(parts[1:], parts[0])


def cross_entropy(q: Scalars, p: list[float], c: float) -> Tensor:
    return plus([-p_v * q_v.log() for p_v, q_v in zip(p, q, strict=True)])


def reverse_kl(q: Scalars, p: list[float], c: float) -> Tensor:
    return plus([q_v * (q_v / p_v).log() for p_v, q_v in zip(p, q, strict=True)])


def jsd(q: Scalars, p: list[float], c: float) -> Tensor:
    parts = []
    for p_v, q_v in zip(p, q, strict=True):
        m_v = (p_v + q_v) / 2
        parts.append(0.5 * q_v * (q_v / m_v).log())
        if p_v > 0:
            parts.append(0.5 * p_v * (math.log(p_v) - m_v.log()))
    return plus(parts)


def alpha(q: Scalars, p: list[float], c: float) -> Tensor:
    """sum min(c p, q); where q is the smaller the gradient goes through it."""
    full = [c * p_v for p_v in p]
    return plus([q_v if q_v.item() <= f_v else q_v.new_tensor(f_v) for f_v, q_v in zip(full, q, strict=True)])


DEFINITIONS: dict[str, Callable[[Scalars, list[float], float], Tensor]] = {
    "cross_entropy": cross_entropy,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tv": lambda q, p, c: 1 - alpha(q, p, c),
    "lk_alpha": lambda q, p, c: -alpha(q, p, c).log(),
    "alpha": alpha,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    logits_CN: Tensor
    teacher: TileTeacher
    pairs: TilePairs

    @classmethod
    def random(cls, terms: tuple[str, ...], labels: int = 0, whole: bool = False) -> Problem:
        generator = torch.Generator().manual_seed(len(terms) + 10 * labels)

        def random(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        raw_RN = 4 * random(3, SIZE)
        named = {}
        for number in range(labels):
            index_C = torch.randint(0, SIZE, (len(ROWS),), generator=generator)
            index_C[number::3] = -1
            named[f"label{number}"] = Label(weight_C=random(len(ROWS)), index_C=index_C)
        return cls(
            logits_CN=4 * random(len(ROWS), SIZE) - 1,
            teacher=TileTeacher(
                probs_RN=raw_RN.softmax(-1),
                inside_R=None if whole else torch.tensor([0.9, 0.35, 0.6], dtype=torch.float64),
                log_probs_RN=raw_RN.log_softmax(-1),
            ),
            pairs=TilePairs(
                row_C=torch.tensor(ROWS), runs=RUNS, weight={term: random(len(ROWS)) for term in terms}, labels=named
            ),
        )

    def run(self, *, with_grad: bool = True, temporary_bytes: int = TWO_ROWS) -> tuple[TileTerms, Tensor]:
        """(terms, what stands in the logits' place)."""
        logits_CN = self.logits_CN.clone()
        terms = distillation_tile(
            logits_CN, self.teacher, self.pairs, with_grad=with_grad, temporary_bytes=temporary_bytes
        )
        return terms, logits_CN

    def by_hand(self) -> tuple[dict[str, list[float]], Tensor]:
        """(every value that the tile owes, and alpha; the gradient)."""
        leaf_CN = self.logits_CN.clone().requires_grad_()
        inside_R = self.teacher.inside_R
        names = {"cross_entropy", "alpha", *self.pairs.weight, *self.pairs.labels}
        values: dict[str, list[float]] = {name: [] for name in names}
        total = leaf_CN.new_zeros(()) + 0.0 * leaf_CN.sum()
        for pair, row in enumerate(self.pairs.row_C.tolist()):
            q = softmax(list(leaf_CN[pair]))
            p, c = self.teacher.probs_RN[row].tolist(), 1.0 if inside_R is None else float(inside_R[row])
            for name in names - set(self.pairs.labels):
                term = DEFINITIONS[name](q, p, c)
                values[name].append(float(term.detach()))
                if name in self.pairs.weight:
                    total = total + self.pairs.weight[name][pair] * term
            for name, label in self.pairs.labels.items():
                index = int(label.index_C[pair])
                term = -q[index].log() if index >= 0 else q[0].new_zeros(())
                values[name].append(float(term.detach()))
                total = total + label.weight_C[pair] * term
        total.backward()
        assert leaf_CN.grad is not None
        return values, leaf_CN.grad


def check(problem: Problem, temporary_bytes: int = TWO_ROWS) -> None:
    terms, dlogits_CN = problem.run(temporary_bytes=temporary_bytes)
    values, want_CN = problem.by_hand()
    assert terms.value.keys() == values.keys() - {"alpha"}
    for name, value_C in {**terms.value, "alpha": terms.alpha_C}.items():
        assert value_C.tolist() == pytest.approx(values[name], rel=1e-12, abs=1e-14), name
    torch.testing.assert_close(dlogits_CN, want_CN, rtol=1e-11, atol=1e-14)
    assert terms.best_C.tolist() == [row.index(max(row)) for row in problem.logits_CN.tolist()]


CHOICES = [*((term,) for term in SOFT_TERMS), ("tv", "lk_alpha"), ("cross_entropy", "jsd"), MIX, MIX[::-1]]


@pytest.mark.parametrize("terms", CHOICES, ids="+".join)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("labels", [0, 2])
def test_every_value_and_gradient_is_the_definitions(terms: tuple[str, ...], whole: bool, labels: int) -> None:
    check(Problem.random(terms, labels, whole))


# One row at a time, runs cut in two, and everything in one piece.
@pytest.mark.parametrize("temporary_bytes", [1, TWO_ROWS, 1 << 20])
@pytest.mark.parametrize("terms", [("cross_entropy",), MIX, ()], ids="+".join)
def test_slices_may_have_any_size(terms: tuple[str, ...], temporary_bytes: int) -> None:
    check(Problem.random(terms, labels=1), temporary_bytes)


def test_without_any_term_the_gradient_is_zero() -> None:
    problem = Problem.random(())
    check(problem)
    assert not problem.run()[1].any()


@pytest.mark.parametrize("terms", [("cross_entropy",), MIX, ()], ids="+".join)
def test_without_gradient_the_terms_are_the_same(terms: tuple[str, ...]) -> None:
    problem = Problem.random(terms, labels=2)
    (got, _), (want, _) = problem.run(with_grad=False), problem.run()
    assert got.value.keys() == want.value.keys()
    for name, value_C in got.value.items():
        assert torch.equal(value_C, want.value[name]), name
    assert torch.equal(got.alpha_C, want.alpha_C)
    assert torch.equal(got.best_C, want.best_C)


def test_of_equal_logits_the_first_is_the_best() -> None:
    size = 300
    generator = torch.Generator().manual_seed(0)
    logits_CN = torch.randn(3, size, dtype=torch.float64, generator=generator)
    for pair, tied in enumerate(([5, 6], [130, 290], [299, 2, 150])):
        logits_CN[pair, tied] = 9.0
    teacher = TileTeacher(probs_RN=torch.rand(3, size, dtype=torch.float64, generator=generator).softmax(-1))
    pairs = TilePairs(
        row_C=torch.arange(3), runs=((0, 3, 0),), weight={"cross_entropy": torch.ones(3, dtype=torch.float64)}
    )
    terms = distillation_tile(logits_CN, teacher, pairs, with_grad=True, temporary_bytes=1 << 20)
    assert terms.best_C.tolist() == [5, 130, 2]


def test_tokens_that_the_teacher_excludes() -> None:
    problem = Problem.random(("jsd", "cross_entropy", "tv"))
    raw_RN = problem.teacher.probs_RN.log()
    raw_RN[:, ::3] = -math.inf
    teacher = replace(problem.teacher, probs_RN=raw_RN.softmax(-1), log_probs_RN=raw_RN.log_softmax(-1))
    check(replace(problem, teacher=teacher))


def test_an_overlap_that_underflows_leaves_a_finite_gradient() -> None:
    """fp32, disjoint p and q: -log alpha is cut at the smallest number, and weights times its slope stay numbers."""
    logits_CN = torch.tensor([[1e4, 0.0, -1e4]])
    raw_RN = torch.tensor([[-1e4, 0.0, 1e4]])
    teacher = TileTeacher(probs_RN=raw_RN.softmax(-1), log_probs_RN=raw_RN.log_softmax(-1))
    weight = {"lk_alpha": torch.tensor([100.0]), "tv": torch.tensor([1.0])}
    pairs = TilePairs(row_C=torch.zeros(1, dtype=torch.int64), runs=((0, 1, 0),), weight=weight)
    terms = distillation_tile(logits_CN, teacher, pairs, with_grad=True, temporary_bytes=1 << 20)
    assert terms.alpha_C.tolist() == [0.0]
    assert terms.value["lk_alpha"].item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny), rel=1e-6)
    assert logits_CN.isfinite().all()


def test_no_pairs() -> None:
    problem = Problem.random(MIX)
    empty = TilePairs(row_C=torch.zeros(0, dtype=torch.int64), runs=(), weight={t: torch.zeros(0) for t in MIX})
    terms = distillation_tile(
        problem.logits_CN[:0].clone(), problem.teacher, empty, with_grad=True, temporary_bytes=TWO_ROWS
    )
    assert terms.alpha_C.shape == terms.best_C.shape == (0,)
