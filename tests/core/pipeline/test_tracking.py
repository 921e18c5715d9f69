"""A run with somebody's own tracker, found through an entry point: what it is told, and that sessions are one run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.errors import ConfigError
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.tracking import followed_run, track_evaluation, tracked

DOCUMENTED = Path(__file__).parents[3] / "docs" / "tracking.md"


def plugin() -> str:
    """The example of the documentation."""
    block = re.search(r"^```python\n(.*?)^```", DOCUMENTED.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution with one tracker, on the path."""
    info = tmp_path / "plugin" / "lines_dist-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lines_dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchspec.trackers]\nlines = lines_module:SPEC\n")
    (info.parent / "lines_module.py").write_text(plugin())
    monkeypatch.syspath_prepend(info.parent)
    registry.trackers.cache_clear()
    yield
    registry.trackers.cache_clear()
    sys.modules.pop("lines_module", None)


def told(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "lines.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("lines")
def test_sessions_of_a_run_are_one_run_to_its_trackers(make_config: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("train.trackers=[lines, tensorboard]", "engine.options={}", "train.checkpoint_every=2")
    config, provenance = make_config(run, "train.max_steps=2", *settings)
    train(config, provenance=provenance)
    config, provenance = make_config(run, "train.max_steps=4", *settings)
    train(config, provenance=provenance)
    said = told(run)
    first, second = (each for each in said if "begin" in each)
    assert first["begin"] == second["begin"] == json.loads((run / "trackers.json").read_text())["id"]
    assert (first["step"], second["step"], first["name"]) == (0, 2, "run")
    assert (first["config"]["train.max_steps"], second["config"]["train.max_steps"]) == (2, 4)
    assert first["config"]["draft.unroll"] == config.draft.unroll
    assert first["environment"]["ranks"] == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {each["at"]: each["values"]["train/loss"] for each in said if "train/loss" in each.get("values", {})}
    assert losses == {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    name = "validation/acceptance_length"
    validated = [each["values"][name] for each in said if name in each.get("values", {})]
    results = [each["results"] for each in said if "results" in each]
    assert (results[-1]["step"], results[-1]["acceptance_length"]) == (4, max(validated))
    assert [list(each) for each in said if "end" in each] == [["end"], ["end"]]
    assert list((run / "tensorboard").iterdir())

    assert followed_run(run / "draft") == run.resolve()
    track_evaluation(run, {"acceptance_length": 1.5, "acceptance_per_position": [0.5], "lossless": True, "engine": "x"})
    begun, found, ended = told(run)[-3:]
    assert begun["begin"] == first["begin"]
    assert found["results"] == {
        "eval/acceptance_length": 1.5,
        "eval/acceptance_per_position/1": 0.5,
        "eval/lossless": 1.0,
    }
    assert ended == {"end": True}


def test_a_draft_of_no_run_belongs_to_none(tmp_path: Path) -> None:
    assert followed_run(tmp_path / "draft") is None


def test_everything_wrong_with_trackers_is_said_at_once(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = {"target": {"path": str(tmp_path)}, "output": str(tmp_path / "run"), "data": {"train": ["none.jsonl"]}}
    with pytest.raises(ConfigError) as caught:
        load_config(values=values, overrides=["train.trackers=[wandb, mlflow, tensorbord, mlflow]"])
    found = {(each.field, each.value): f"{each.message} {each.remedy}" for each in caught.value.problems}
    assert 'pip install "torchspec[wandb]"' in found["train.trackers", "wandb"]
    assert "did you mean tensorboard?" in found["train.trackers", "tensorbord"]
    assert [str(each) for each in caught.value.problems if "named twice" in each.message]
    assert ("data.train", "none.jsonl") in found
    with pytest.raises(ConfigError, match=r"train.project: is for trackers"):
        load_config(values=values, overrides=["train.project=mine"])


@pytest.mark.usefixtures("lines")
def test_secrets_among_the_settings_reach_no_tracker(make_config: Any, tmp_path: Path) -> None:
    config, _ = make_config(tmp_path / "run", "train.trackers=[lines]")
    engine = config.engine.model_copy(update={"options": {"api_key": "sesame", "place": "http://a:sesame@c/"}})
    config = config.model_copy(update={"engine": engine})
    opened = run_dir.open_run(config)
    with opened.lock, tracked(opened, config, {}, 0):
        pass
    (begun,) = (each for each in told(tmp_path / "run") if "begin" in each)
    assert begun["config"]["engine.options.api_key"] == "***"
    assert begun["config"]["engine.options.place"] == "http://***@c/"
    assert "sesame" not in (tmp_path / "run" / "lines.jsonl").read_text()
