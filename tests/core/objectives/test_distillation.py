"""The chunked loss with gradients made in its forward, against the eager terms under autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives import chunks
from torchspec.core.objectives.distillation import TERMS, distil
from torchspec.core.objectives.teacher import Coverage

Heads = Callable[..., TargetHead]
MIX = {"kl": 0.3, "cross_entropy": 0.2, "reverse_kl": 0.5, "jsd": 0.7, "tv": 0.4, "lk_alpha": 0.6, "argmax": 0.1,
       "ground_truth": 0.8}  # fmt: skip


@pytest.mark.parametrize("most_rows", [1, 4, 100])
@pytest.mark.parametrize("coverage", ["drop", "renormalise", "weight"])
@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0}, MIX], ids=["cross_entropy", "mix"])
def test_values_terms_and_gradients(
    cases: ModuleType, case: Any, most_rows: int, coverage: Coverage, weights: Mapping[str, float]
) -> None:
    given = replace(case, coverage=coverage, weights=weights)
    cases.exactly(given.run(most_rows), given.reference())


@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone(cases: ModuleType, case: Any, name: str) -> None:
    given = replace(case, weights={name: 1.7}, coverage="weight")
    cases.exactly(given.run(4), given.reference())


@pytest.mark.parametrize("names", [("tv", "argmax"), ("ground_truth", "kl"), ("lk_alpha", "reverse_kl", "kl")])
def test_a_few_terms_in_any_order(cases: ModuleType, case: Any, names: tuple[str, ...]) -> None:
    given = replace(case, weights={name: 0.5 + place for place, name in enumerate(names)})
    cases.exactly(given.run(4), given.reference())


@pytest.mark.parametrize("coverage", ["drop", "weight"])
def test_a_survey_changes_nothing(cases: ModuleType, case: Any, coverage: Coverage) -> None:
    given = replace(case, coverage=coverage, weights=MIX)
    cases.compare(given.run(4, survey=True), given.run(4), loss=1e-13, gradient=1e-13, terms=1e-13)


def test_one_supervised_pair(cases: ModuleType, make_head: Heads) -> None:
    for vocabulary in cases.vocabularies(60).values():
        given = cases.Case.random(make_head(60, 8), vocabulary, rows=1, steps=3)
        assert given.sizes == (1, 0, 0)
        given = replace(given, weights=MIX, coverage="weight", truth_M=torch.tensor([3]))
        cases.exactly(given.run(4), given.reference())


@pytest.mark.parametrize("survey", [False, True])
def test_no_pair_at_all(cases: ModuleType, make_head: Heads, survey: bool) -> None:
    for vocabulary in cases.vocabularies(60).values():
        got = replace(cases.Case.random(make_head(60, 8), vocabulary, rows=0, steps=2), weights=MIX).run(
            4, survey=survey
        )
        assert got.loss.item() == 0.0
        assert all(not gradient.any() for gradient in got.gradients().values())
        assert [tuple(gradient.shape) for gradient in got.doutputs] == [(3, 8), (3, 8)]
        assert got.terms.agree_M.shape == (0,)
        assert got.terms.truth_M.shape == (0,)


def test_idle_slots_get_no_gradient(case: Any) -> None:
    got = case.run(4)
    for gradient_SH, slot_m in zip(got.doutputs, case.slot_M.split(list(case.sizes)), strict=True):
        taught = set(slot_m.tolist())
        assert all(not gradient_SH[slot].any() for slot in range(len(gradient_SH)) if slot not in taught)


@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0}, MIX], ids=["cross_entropy", "mix"])
def test_float32(cases: ModuleType, make_head: Heads, weights: Mapping[str, float]) -> None:
    for vocabulary in cases.vocabularies(600).values():
        given = cases.Case.random(make_head(600, 64, 0.3, torch.float32), vocabulary, rows=40, steps=3)
        given = replace(given, weights=weights, coverage="weight")
        cases.compare(given.run(16), given.reference(), loss=1e-6, gradient=1e-5, terms=1e-5)


@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0}, MIX], ids=["cross_entropy", "mix"])
def test_bfloat16_compute_keeps_fp32_logits(cases: ModuleType, make_head: Heads, weights: Mapping[str, float]) -> None:
    """The draft's logits rounded to bf16 are beyond these bounds, and so is a target whose logits are not."""
    given = cases.Case.random(make_head(600, 64, 0.3, torch.bfloat16), cases.every_third(600), rows=64, steps=3)
    given = replace(given, weights=weights, coverage="weight")
    got = given.run(16)
    assert got.loss.dtype == got.terms.alpha_M.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in got.gradients().values())
    cases.compare(got, given.reference(), loss=1e-6, gradient=4e-3, terms=1e-4)


@pytest.mark.parametrize("most_rows", [1, 4, 100])
@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0}, MIX], ids=["cross_entropy", "mix"])
def test_what_is_added_to_the_logits(
    cases: ModuleType, case: Any, most_rows: int, weights: Mapping[str, float]
) -> None:
    given = replace(case, weights=weights, coverage="weight").with_extras()
    want = given.reference()
    assert not torch.equal(want.terms.agree_M, case.reference().terms.agree_M), "it decides first choices"
    cases.exactly(given.run(most_rows), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", ["whole", "pruned"])
def test_what_is_added_to_the_logits_in_compute_precision(
    cases: ModuleType, make_head: Heads, dtype: torch.dtype, ids: str
) -> None:
    target = make_head(600, 64, 0.3, dtype)
    given = cases.Case.random(target, cases.vocabularies(600)[ids], rows=40, steps=3).with_extras(24)
    given = replace(given, weights=MIX, coverage="weight")
    got = given.run(16)
    assert all(gradient.dtype == dtype for gradient in got.gradients().values())
    half = dtype == torch.bfloat16
    cases.compare(
        got, given.reference(), loss=1e-6, gradient=4e-3 if half else 1e-5, terms=1e-4 if half else 1e-5
    )  # fmt: skip


def test_what_is_added_without_any_pair(cases: ModuleType, make_head: Heads) -> None:
    got = cases.Case.random(make_head(60, 8), cases.every_third(60), rows=0, steps=2).with_extras().run(4)
    assert got.loss.item() == 0.0
    assert {"extras[0]", "extras[1]", "extra"} < got.gradients().keys()
    assert all(not gradient.any() for gradient in got.gradients().values())


def test_what_is_added_needs_its_map(case: Any) -> None:
    given, ops = case.with_extras(), FusedOps()
    leaves = given.leaves()
    with pytest.raises(AssertionError, match="needs its map"):
        distil(leaves.outputs, leaves.head(), given.supervision(4, ops), ops)


def test_a_frozen_head_changes_nothing_else(cases: ModuleType, case: Any) -> None:
    trained = replace(case, weights=MIX).with_extras()
    frozen = replace(trained, frozen=True)
    cases.exactly(frozen.run(4), frozen.reference())
    got, want = frozen.run(4).gradients(), trained.run(4).gradients()
    assert want.keys() - got.keys() == {"head"}
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())


@pytest.mark.parametrize("coverage", ["drop", "renormalise", "weight"])
@pytest.mark.parametrize("names", [("kl", "tv"), TERMS], ids=["two of the mix", "all"])
def test_weights_of_each_pair(cases: ModuleType, case: Any, coverage: Coverage, names: tuple[str, ...]) -> None:
    given = replace(case, weights=MIX, coverage=coverage).weighing_each(names)
    cases.exactly(given.run(4), given.reference())


# Logits up to about 1e4: one token has all the probability, most others underflow to nothing in fp32.
@pytest.mark.parametrize("scale", [30.0, 500.0])
@pytest.mark.parametrize("name", [name for name in TERMS if name != "lk_alpha"])
def test_saturated_logits_stay_finite_and_right(cases: ModuleType, make_head: Heads, scale: float, name: str) -> None:
    for vocabulary in cases.vocabularies(60).values():
        head = make_head(60, 8, scale, torch.float32)
        given = cases.Case.random(head, vocabulary, rows=17, steps=3, scale=scale)
        # Other slots' outputs: draft and target disagree.
        given = replace(given, outputs=tuple(output_SH.roll(1, 0) for output_SH in given.outputs))
        ordinary = replace(given, weights={"ground_truth": 1.0}).reference()
        got = replace(given, weights={name: 1.0}).run(4)
        want = replace(given, weights={name: 1.0}).reference()
        assert want.terms.cross_entropy_M.max() > 10 * scale
        # fp32 logits of size 1e4 are known to 1e-3, which the probabilities of near-equal ones feel.
        cases.compare(got, want, loss=1e-6, gradient=1e-3, terms=2e-3, ordinary=ordinary)


def test_a_saturated_overlap_stays_finite(cases: ModuleType, make_head: Heads) -> None:
    given = cases.Case.random(
        make_head(60, 8, 500.0, torch.float32), cases.every_third(60), rows=17, steps=3, scale=-500.0
    )
    got = replace(given, weights={"lk_alpha": 8.0}).run(4)
    assert got.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in got.gradients().values())


@pytest.mark.parametrize("survey", [False, True])
def test_real_vocabulary(cases: ModuleType, make_head: Heads, survey: bool) -> None:
    """151,936 target tokens, 32,000 drafted ones, fp32."""
    target = 151_936
    ids_N = torch.randperm(target, generator=torch.Generator().manual_seed(0))[:32_000].sort().values
    vocabulary = VocabularyMap(ids_N=ids_N, target_size=target)
    given = cases.Case.random(make_head(target, 8, 1.0, torch.float32), vocabulary, rows=6, steps=2)
    given = replace(given, weights={"cross_entropy": 1.0, "tv": 1.0, "jsd": 1.0}, coverage="weight")
    # torch's fp32 softmax adds 4,000 numbers one after the other in each of 8 lanes: 1e-5 in the normaliser.
    cases.compare(given.run(4, FusedOps(), survey=survey), given.reference(), loss=1e-5, gradient=2e-5, terms=2e-5)


@pytest.mark.parametrize("ids", [[10, 11, 12, 15, 20, 45, 46, 47, 59], list(range(0, 60, 3))])
@pytest.mark.parametrize("survey", [False, True])
def test_tiles_of_the_target_vocabulary(
    cases: ModuleType, make_head: Heads, monkeypatch: pytest.MonkeyPatch, ids: list[int], survey: bool
) -> None:
    monkeypatch.setattr(chunks, "LARGEST_TILE", 7)
    vocabulary = VocabularyMap(ids_N=torch.tensor(ids), target_size=60)
    given = replace(cases.Case.random(make_head(60, 8), vocabulary, rows=17, steps=3), weights=MIX, coverage="weight")
    cases.exactly(given.run(4, survey=survey), given.reference())


def test_a_second_derivative_is_refused(case: Any) -> None:
    """Not taken for zero: the gradient that comes in, of the loss itself, has no graph."""
    leaves, ops = case.leaves(), FusedOps()
    loss = distil(leaves.outputs, leaves.head(), case.supervision(4, ops), ops)[0]
    with pytest.raises(RuntimeError, match="differentiable once: leave create_graph out"):
        torch.autograd.grad(loss, leaves.trained(), create_graph=True)


def test_a_head_may_be_asked_for_its_gradient_twice(case: Any) -> None:
    given = case.with_extras()
    leaves, ops = given.leaves(), FusedOps()
    loss = 3 * distil(leaves.outputs, leaves.head(), given.supervision(4, ops), ops, leaves.extras)[0]
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves.trained()]
    assert len(first) == 9
    loss.backward()
    for leaf, gradient in zip(leaves.trained(), first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=1e-14, atol=0)
