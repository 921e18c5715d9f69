"""Which side is said to bound a run."""

from __future__ import annotations

from typing import Any

import pytest

from torchspec.core.report.pipeline import verdict, waiting, working


def rows(wait: float, *busy: float, steps: int = 6) -> list[dict[str, Any]]:
    """Steps of 2 s, of which the trainer waits a share; the first two wait for everything to begin."""
    return [
        {
            "step": step,
            "step_seconds": 2.0,
            "time": {"capture": 2.0 * (0.9 if step < 3 else wait), "forward": 0.5},
            "pipeline": {"engines": [{"busy": share} for share in busy]},
        }
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (rows(0.4, 0.95, 0.85), "waited for features 40% of the time, the engines worked 90% of it. The engines bound"),
        (rows(0.01, 0.2), "The trainer bounds the run: fewer engines would do"),
        (rows(0.4, 0.2), "Both wait"),
        (rows(0.08, 0.9), "Both sides are about as fast"),
        (rows(0.4), "a faster disk would help"),
        (rows(0.02), "The trainer waited for features 2% of the time."),
    ],
)
def test_the_verdict(made: list[dict[str, Any]], said: str) -> None:
    assert said in verdict(made)


def test_nothing_is_said_of_runs_in_which_nothing_flows() -> None:
    inside = [{key: value for key, value in row.items() if key != "pipeline"} for row in rows(0.4)]
    assert verdict(inside) == ""
    assert waiting(inside) == working(inside) == []
    assert verdict(rows(0.4, 0.5, steps=2)) == "", "too short"
