"""What the terms of an objective weigh at a moment, against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from torchspec.core.interfaces.algorithm import START, Moment
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.objectives.distillation import TERMS
from torchspec.core.objectives.terms import ObjectiveOptions, Ramp, mean_alpha, term_weights

WIDE: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
SIZES = (4, 0, 3)


def after(alpha: list[float], supervised: list[int], progress: float = 0.0) -> Moment:
    sums = {"alpha": torch.tensor(alpha), "supervised": torch.tensor(supervised)}
    return Moment(progress=progress, previous=sums)


def weights(moment: Moment, objective: Mapping[str, Any], **options: Any) -> dict[str, float | Tensor]:
    given = ObjectiveOptions(objective=objective, **options)
    return term_weights(given, moment, SIZES, **WIDE)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 2.0), (0.1, 1.6), (0.25, 1.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0)]
)
def test_a_ramp_is_linear_and_then_stays(progress: float, expected: float) -> None:
    assert Ramp(start=2, end=0, until=0.5).at(progress) == pytest.approx(expected)
    assert weights(Moment(progress=progress), {"tv": {"start": 2, "end": 0, "until": 0.5}}) == {
        "tv": pytest.approx(expected)
    }


def test_a_ramp_takes_the_whole_training_unless_told() -> None:
    assert [Ramp(start=0, end=1).at(step / 4) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("name", TERMS)
def test_other_terms_weigh_what_was_given(name: str) -> None:
    assert weights(after([1.0, 1.0, 1.0], [1, 1, 1]), {name: 0.3}) == {name: 0.3}


@pytest.mark.parametrize("eta", [3.0, 0.5])
def test_lk_lambda_is_kl_and_tv_by_how_often_a_position_is_accepted(eta: float) -> None:
    """2602.23881, with the mean of the window before."""
    found = weights(after([1.5, 4.0, 2.7], [3, 5, 3]), {"lk_lambda": 0.7}, lk_eta=eta)
    assert found.keys() == {"kl", "tv"}
    place = 0
    for size, alpha in zip(SIZES, (1.5 / 3, 4.0 / 5, 2.7 / 3), strict=True):
        part = math.exp(-eta * alpha)
        for _ in range(size):
            kl_M, tv_M = found["kl"], found["tv"]
            assert isinstance(kl_M, Tensor)
            assert isinstance(tv_M, Tensor)
            assert float(kl_M[place]) == pytest.approx(0.7 * part)
            assert float(tv_M[place]) == pytest.approx(0.7 * (1 - part))
            place += 1
    assert place == sum(SIZES)


@pytest.mark.parametrize("moment", [START, after([0.0, 0.0, 0.0], [0, 0, 0])])
def test_before_anything_is_known_lk_lambda_is_kl(moment: Moment) -> None:
    found = weights(moment, {"lk_lambda": 0.7})
    assert torch.equal(torch.as_tensor(found["kl"]), torch.full((7,), 0.7, dtype=torch.float64))
    assert not torch.as_tensor(found["tv"]).any()


def test_a_position_that_taught_nothing_counts_as_never_accepted() -> None:
    previous = after([0.8, 0.0, 0.0], [2, 0, 4]).previous
    assert mean_alpha(previous, 3).tolist() == pytest.approx([0.4, 0.0, 0.0])
    found = weights(after([0.8, 0.0, 0.8], [2, 4, 0]), {"lk_lambda": 1.0})
    assert torch.as_tensor(found["kl"])[4:].tolist() == [1.0, 1.0, 1.0]


def test_terms_that_are_made_of_the_same_add_up() -> None:
    moment = after([1.5, 4.0, 2.7], [3, 5, 3], progress=0.5)
    alone = weights(moment, {"lk_lambda": 0.7})
    for objective in ({"kl": 0.5, "lk_lambda": 0.7}, {"lk_lambda": 0.7, "kl": {"start": 1, "end": 0}}):
        found = weights(moment, {**objective, "jsd": 0.2})
        assert found.keys() == {"kl", "tv", "jsd"}
        assert torch.equal(torch.as_tensor(found["kl"]), torch.as_tensor(alone["kl"]) + 0.5)
        assert torch.equal(torch.as_tensor(found["tv"]), torch.as_tensor(alone["tv"]))
        assert found["jsd"] == 0.2


def test_lk_lambda_ramps_too() -> None:
    moment = after([1.5, 4.0, 2.7], [3, 5, 3], progress=0.5)
    half = weights(moment, {"lk_lambda": {"start": 0, "end": 0.7}})
    whole = weights(moment, {"lk_lambda": 0.7})
    for name in ("kl", "tv"):
        torch.testing.assert_close(half[name], 0.5 * whole[name])


def test_only_lk_lambda_remembers_and_only_logs_are_kept_that_are_read() -> None:
    assert ObjectiveOptions(objective={"lk_lambda": 1.0, "kl": 1.0}).remembers == ("alpha", "supervised")
    assert ObjectiveOptions(objective={"kl": 1.0, "tv": 1.0}).remembers == ()
    assert not ObjectiveOptions(objective={"lk_lambda": 1.0}).with_logs
    assert ObjectiveOptions(objective={"jsd": Ramp(start=0, end=1)}).with_logs


@pytest.mark.parametrize(
    "given",
    [{}, {"lk": 1.0}, {"kl": 0}, {"kl": -1.0}, {"kl": {"start": -1, "end": 1}}, {"kl": {"start": 1}},
     {"kl": {"start": 0, "end": 1, "until": 0}}, {"kl": {"start": 0, "end": 1, "until": 1.5}},
     {"kl": {"start": 0, "end": 1, "from": 1}}, {"kl": {"start": 0, "end": 0}}],
)  # fmt: skip
def test_objectives_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ObjectiveOptions(objective=given)


def test_the_loss_of_lk_lambda_is_that_of_its_parts(cases: Any, make_head: Callable[..., TargetHead]) -> None:
    """Through the pass, value and gradient: of each step lambda KL + (1 - lambda) TV under autograd."""
    case = cases.Case.random(make_head(60, 8), cases.every_third(60), rows=17, steps=3)
    alpha = case.reference().terms.alpha_M.split(list(case.sizes))
    moment = after([float(part.sum()) for part in alpha], list(case.sizes))
    options = ObjectiveOptions(objective={"lk_lambda": 1.3, "reverse_kl": 0.1})
    given = replace(case, coverage="weight", weights=term_weights(options, moment, case.sizes, **WIDE))
    got = given.run(4)
    lambda_M = torch.cat([torch.full((len(part),), math.exp(-3 * float(part.mean()))).double() for part in alpha])
    kl, tv, reverse = (
        replace(given, base_M=base_M, weights={name: 1.0}).reference()
        for base_M, name in (
            (1.3 * lambda_M * case.base_M, "kl"), (1.3 * (1 - lambda_M) * case.base_M, "tv"),
            (0.1 * case.base_M, "reverse_kl"),
        )
    )  # fmt: skip
    torch.testing.assert_close(got.loss, kl.loss + tv.loss + reverse.loss, rtol=1e-6, atol=0)
    for name, gradient in got.gradients().items():
        want = sum(part.gradients()[name] for part in (kl, tv, reverse))
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6 * float(want.norm()))
