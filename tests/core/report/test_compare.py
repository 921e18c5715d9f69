"""Several runs on one page: what is said to differ, and what must not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchspec.core.errors import TorchspecError
from torchspec.core.report.compare import differing_settings, figures, incomparable, write_comparison
from torchspec.core.report.html import read_run, write_report

HOSTILE = "<script>alert('$x')</script>"


def make_run(place: Path, *, lr: float = 1e-3, fingerprint: str = "a", length: float | None = 2.0) -> Path:
    place.mkdir(parents=True)
    rows = [
        {"kind": "train", "step": step, "loss": 4.0 / step, "step_seconds": 30.0, "memory": {"peak": step * 2**20}}
        for step in (1, 2)
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    (place / "data.json").write_text(json.dumps({"fingerprint": fingerprint}))
    config = {"output": str(place), "target": {"path": HOSTILE}, "train": {"lr": lr}}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    if length is not None:
        (place / "eval.json").write_text(json.dumps({"acceptance_length": length, "prompts": 8, "lossless": True}))
    return place


def table(*places: Path) -> dict[str, list[tuple[str, str]]]:
    return dict(figures({place.name: read_run(place) for place in places}))


def test_figures_stand_with_their_differences_to_the_first_run(tmp_path: Path) -> None:
    found = table(make_run(tmp_path / "a"), make_run(tmp_path / "b", length=2.5), make_run(tmp_path / "c", length=None))
    assert found["acceptance length"] == [("2", ""), ("2.5", "+25.0%"), ("", "")]
    assert found["minutes of training"] == [("1", ""), ("1", "+0.0%"), ("1", "+0.0%")]
    assert found["peak memory, MiB"][0] == ("2", "")
    assert found["lossless"] == [("yes", ""), ("yes", ""), ("", "")]
    assert "speed-up" not in found


def test_settings_that_differ_are_named_and_no_others(tmp_path: Path) -> None:
    runs = {"a": read_run(make_run(tmp_path / "a")), "b": read_run(make_run(tmp_path / "b", lr=2e-3))}
    assert differing_settings(runs) == [("train.lr", ["0.001", "0.002"])]
    assert incomparable(runs) == []


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("data.json", {"fingerprint": "b"}, "The training data differ."),
        ("config.yaml", {"target": {"path": "other"}}, "The targets differ."),
        ("eval.json", {"acceptance_length": 2.0, "prompts": 9}, "The evaluations differ in prompts: 8, 9."),
        ("eval.json", {"prompts": 8, "prompts_digest": "0b"}, "The evaluations differ in prompts_digest: "),
        ("eval.json", {}, "Without an evaluation (eval.json): b."),
    ],
)
def test_what_speaks_against_a_comparison(tmp_path: Path, file: str, values: dict[str, Any], said: str) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / file).write_text(json.dumps(values))
    assert any(warning.startswith(said) for warning in incomparable({"a": read_run(a), "b": read_run(b)}))


def test_the_pages_escape_what_they_show(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "1" / "<b>$_{"), make_run(tmp_path / "2" / "<b>$_{", lr=2e-3)
    (b / "config.yaml").write_text(yaml.safe_dump({"target": {"path": HOSTILE + "2"}}))
    for page in (write_report(a), write_comparison([a, b])):
        text = page.read_text()
        assert "<script" not in text
        assert "<b>$" not in text
        assert "&lt;script&gt;" in text


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(TorchspecError, match="no_run is not a run directory"):
        write_comparison([make_run(tmp_path / "a"), tmp_path / "no_run"])
