"""A term of one's own, by autograd over chunks: the same as all terms over all logits at once, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives import eager
from torchspec.core.objectives.distillation import Supervision
from torchspec.core.objectives.own import OwnTerm, distil_by
from torchspec.core.objectives.teacher import Coverage
from torchspec.core.objectives.vocabulary_teacher import VocabularyTeacher


def mix(logits_CN: Tensor, probs_CN: Tensor) -> Tensor:
    return 0.3 * eager.cross_entropy(logits_CN, probs_CN) + 0.7 * eager.reverse_kl(logits_CN, probs_CN.log())


def run(case: Any, term: OwnTerm, most_rows: int) -> Any:
    leaves, ops = case.leaves(), FusedOps()
    loss, terms = distil_by(term, leaves.outputs, leaves.head(), case.supervision(most_rows, ops), ops)
    (4 * loss).backward()
    return leaves.found(loss, terms, scale=4)


@pytest.mark.parametrize("most_rows", [1, 4, 100])
@pytest.mark.parametrize("coverage", ["drop", "renormalise", "weight"])
def test_value_terms_and_gradients(cases: ModuleType, case: Any, most_rows: int, coverage: Coverage) -> None:
    want = replace(case, coverage=coverage, weights={"cross_entropy": 0.3, "reverse_kl": 0.7}).reference()
    cases.exactly(run(replace(case, coverage=coverage), mix, most_rows), want)


def test_without_pairs_it_is_a_zero_with_a_graph(case: Any) -> None:
    leaves, ops = case.leaves(), FusedOps()
    supervision = replace(case.supervision(4, ops), chunks=())
    loss, _ = distil_by(mix, leaves.outputs, leaves.head(), supervision, ops)
    loss.backward()
    assert loss == 0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.trained())


def test_a_part_of_the_vocabulary_is_refused(case: Any) -> None:
    leaves, ops = case.leaves(), FusedOps()
    teacher = object.__new__(VocabularyTeacher)
    supervision: Supervision = replace(case.supervision(4, ops), teacher=teacher)
    with pytest.raises(ConfigError, match="shard_logits=tokens"):
        distil_by(mix, leaves.outputs, leaves.head(), supervision, ops)


def test_no_logits_wait_for_the_backward_pass(case: Any) -> None:
    leaves, ops = case.leaves(), FusedOps()
    loss, _ = distil_by(mix, leaves.outputs, leaves.head(), case.supervision(4, ops), ops)
    kept: Any = loss.grad_fn
    assert [given.shape for given in kept.saved_tensors] == [
        leaf.shape for leaf in (leaves.norm_H, leaves.head_NH, *leaves.outputs)
    ]


def test_it_is_differentiable_once(case: Any) -> None:
    leaves, ops = case.leaves(), FusedOps()
    loss, _ = distil_by(mix, leaves.outputs, leaves.head(), case.supervision(4, ops), ops)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, leaves.norm_H, create_graph=True)
