"""A run's figures as Prometheus takes them."""

from __future__ import annotations

from torchspec.core.pipeline.exporter import figures


def test_numbers_of_a_row_by_their_path() -> None:
    row = {
        "kind": "train", "step": 3, "loss": 1.5, "lr": None, "step_seconds": 2.0, "time": {"capture": 0.5},
        "quarantined": {"row-1": "why"}, "name": "text", "lossless": True,
        "pipeline": {"held_bytes": 10, "engines": [{"busy": 0.5, "tokens_per_second": 7}, {"busy": 0.25}]},
    }  # fmt: skip
    assert dict(figures(row)) == {
        "step": 3.0,
        "loss": 1.5,
        "step_seconds": 2.0,
        "time_capture": 0.5,
        "waiting_fraction": 0.25,
        "pipeline_held_bytes": 10.0,
        "pipeline_engines_busy": 0.75,
        "pipeline_engines_tokens_per_second": 7.0,
    }
    assert dict(figures({"kind": "validation", "step": 4, "acceptance_length": 2.0})) == {
        "validation_step": 4.0,
        "validation_acceptance_length": 2.0,
    }
