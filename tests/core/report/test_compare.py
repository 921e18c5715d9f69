"""Several runs on one page: what is said to differ, and what must not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchspec.core.errors import TorchspecError
from torchspec.core.report.compare import charts_of, differing_settings, figures, incomparable, write_comparison
from torchspec.core.report.html import write_report
from torchspec.core.report.record import read_run

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


def test_a_setting_that_is_unset_here_and_unknown_there_is_no_difference(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    config = yaml.safe_load((b / "config.yaml").read_text())
    (b / "config.yaml").write_text(yaml.safe_dump({**config, "draft": {"gamma": None, "block_size": 16}}))
    assert differing_settings({"a": read_run(a), "b": read_run(b)}) == [("draft.block_size", ["", "16"])]


def test_curves_over_tokens_stand_where_each_run_had_trained_so_many(
    write_run: Any, make_files: Any, tmp_path: Path, undrawn: None
) -> None:
    """The second run trains twice as many tokens a step; its validation is at the tokens of its step."""
    counted = {1: 500, 2: 1000, 3: 1750, 4: 2000}
    files, more = make_files(4), make_files(4)
    for row, other in zip(files["metrics.jsonl"][:4], more["metrics.jsonl"], strict=False):
        row["tokens"], other["tokens"] = counted[row["step"]], 2 * counted[row["step"]]
    runs = {"a": read_run(write_run(tmp_path / "a", files)), "b": read_run(write_run(tmp_path / "b", more))}
    found = {chart.title: chart.views for chart in charts_of(runs)}
    steps, tokens = (view.table for view in found["Loss"])
    losses = {step: f"{1 + 8 / step:.6g}" for step in counted}
    assert steps.rows == tuple((str(step), loss, loss) for step, loss in losses.items())
    expected = {place: ["", ""] for place in (500, 1000, 1750, 2000, 3500, 4000)}
    for step, loss in losses.items():
        expected[counted[step]][0] = expected[2 * counted[step]][1] = loss
    assert tokens.rows == tuple((str(place), *values) for place, values in expected.items())
    _, decoded = (view.table for view in found["Acceptance length in validations"])
    assert decoded.rows == (("2000", "1.9", ""), ("4000", "", "1.9"))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("data.json", {"fingerprint": "b"}, "The training data differ."),
        ("config.yaml", {"target": {"path": "other"}}, "The targets differ."),
        ("config.yaml", {"algorithm": "dflash"}, "The algorithms differ: losses are other quantities then"),
        ("config.yaml", {"draft": {"objective": {"tv": 1.0}}}, "The objectives differ: losses"),
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
