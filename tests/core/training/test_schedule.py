from __future__ import annotations

import itertools
import math

import pytest

from torchspec.core.config.schema import TrainConfig
from torchspec.core.training.schedule import Schedule, warmup_warning

TOTAL, WARMUP = 100, 10


def schedule(shape: str, **changes: object) -> Schedule:
    values = {"schedule": shape, "warmup_steps": WARMUP, "decay_fraction": 0.2, "min_lr_ratio": 0.1}
    return Schedule.of(TrainConfig(**(values | changes)))


@pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak_and_wastes_no_update(shape: str) -> None:
    factors = [schedule(shape).factor(update, TOTAL) for update in range(WARMUP + 1)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[-1] == 1.0
    steps = [b - a for a, b in itertools.pairwise(factors)]
    assert steps == pytest.approx([1 / 11] * WARMUP)


def test_cosine_is_half_a_cosine_down_to_the_minimum() -> None:
    cosine = schedule("cosine")
    assert cosine.factor(55, TOTAL) == pytest.approx(0.55)  # half way: the middle of 1 and 0.1
    assert cosine.factor(70, TOTAL) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 60 / 90)) / 2)
    assert cosine.factor(99, TOTAL) == pytest.approx(0.1, abs=1e-3)


def test_wsd_is_flat_then_linear() -> None:
    wsd = schedule("wsd")
    assert [wsd.factor(update, TOTAL) for update in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert wsd.factor(90, TOTAL) == pytest.approx(0.55)
    assert wsd.factor(99, TOTAL) == pytest.approx(0.1 + 0.9 / 20)


def test_constant_stays() -> None:
    assert {schedule("constant").factor(update, TOTAL) for update in range(WARMUP, TOTAL)} == {1.0}


@pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 5), (5, 5), (6, 5), (3, 0)])
def test_short_runs_stay_between_zero_and_the_peak(shape: str, total: int, warmup: int) -> None:
    for update in range(total):
        assert 0 < schedule(shape, warmup_steps=warmup, decay_fraction=1.0).factor(update, total) <= 1


@pytest.mark.parametrize("ratio", [0.0, 0.015, 0.04, 0.5, 1.0])
def test_a_warm_up_that_follows_the_run_ends_within_it(ratio: float) -> None:
    for total in (*range(1, 60), 10_000):
        made = Schedule.of(TrainConfig(warmup_ratio=ratio))
        warmup = made.warmup_updates(total)
        assert warmup == min(math.ceil(ratio * total), total - 1)
        assert made.factor(warmup, total) == 1.0
        assert warmup_warning(TrainConfig(warmup_ratio=ratio), total) is None


def test_steps_of_a_warm_up_come_before_its_ratio() -> None:
    both = TrainConfig(warmup_steps=7, warmup_ratio=0.5)
    assert Schedule.of(both).warmup_updates(100) == 7


def test_a_warm_up_as_long_as_the_run_is_named() -> None:
    config = TrainConfig(warmup_steps=100)
    assert warmup_warning(config, 101) is None
    said = warmup_warning(config, 100)
    assert said is not None
    assert "train.warmup_steps=100" in said
    assert "100 steps" in said
    assert warmup_warning(config, 0) is None  # nobody knows how many
