"""Samples that cannot be captured leave holes: counted, named, and nothing of them is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.interfaces.features import Captured, FeatureSink, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.feed import DirectFeed
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.signals import StopRequest

REASON = "the engine died of it three times"


class Failing:
    """An engine that cannot capture some of the samples."""

    def __init__(self, inner: Any, fails: Sequence[list[int]]) -> None:
        self.inner, self.fails = inner, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        good = [request for request in batch if list(request.input_ids) not in self.fails]
        made = {ref.record_id: ref for ref in self.inner.capture(good, taps, sink)}
        return [made.get(r.record_id, Quarantined(record_id=r.record_id, reason=REASON)) for r in batch]


def run(tiny: ModuleType, context: ParallelContext, path: Path, *, fails: Sequence[int], job: Any) -> Any:
    trainer = tiny.make_trainer(job, context)
    model = trainer.model
    ids = [job.samples[index].input_ids_T.tolist() for index in fails]
    trainer.model = type(model)(**{**vars(model), "engine": Failing(model.engine, ids)})
    trainer.feed = DirectFeed(trainer.model, context)
    path.mkdir(exist_ok=True)
    with MetricsLog(path / "metrics.jsonl") as log, StopRequest() as stop:
        trainer.run(log, stop)
    return trainer, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_hole_trains_as_an_unsupervised_sample_does(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"epochs": 2}
    samples = tiny.TinySamples(count=13)
    job = tiny.Job(directory=tmp_path / "a", config=config, dtype=torch.float64, samples=samples)
    with caplog.at_level(logging.WARNING, logger="torchspec"):
        trainer, rows = run(tiny, context, tmp_path / "a", fails=[3, 7], job=job)
    other = tiny.Job(
        directory=tmp_path / "b", config=config, dtype=torch.float64,
        samples=tiny.TinySamples(count=13, unsupervised=[3, 7]),
    )  # fmt: skip
    _, expected = run(tiny, context, tmp_path / "b", fails=[], job=other)
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert rows[-1]["samples"] == expected[-1]["samples"] - 4
    lost = [name for row in rows for name in row.get("quarantined", {})]
    names = [samples[index].sample_id for index in (3, 7)]
    assert sorted(lost) == sorted(names * 2), "once an epoch"
    assert trainer.counters.quarantined == 4
    assert trainer.counters.samples + trainer.counters.quarantined == 2 * 13
    assert f"sample {names[0]} is left out of its step: {REASON}" in caplog.text
    tokens = sum(samples.lengths) - samples.lengths[3] - samples.lengths[7]
    assert rows[-1]["tokens"] == 2 * tokens


def test_an_engine_that_captures_next_to_nothing_stops_the_run(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    job = tiny.Job(directory=tmp_path, config={"batch_size": 2}, samples=tiny.TinySamples(count=13))
    with pytest.raises(TargetError, match=rf"step 2: 4 samples could not be captured so far and 0 could.*{REASON}"):
        run(tiny, context, tmp_path / "run", fails=range(13), job=job)
