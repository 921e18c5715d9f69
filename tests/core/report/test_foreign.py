"""Pages of run files that are damaged, of another program, made to deceive, or very large."""

from __future__ import annotations

import copy
import json
import logging
import os
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.errors import TorchspecError
from torchspec.core.report.compare import write_comparison
from torchspec.core.report.html import write_report
from torchspec.core.report.record import KEPT, read_run

HOSTILE = "</pre></script><script>alert(1)</script>'\"&"
WRONG: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), float("-inf"), 10**400, "", "x", HOSTILE, "half \ud800", [], [[]], [None],
    {}, {"a": {}}, {"step": "x"}, [{"step": []}], {HOSTILE: HOSTILE}, list(range(300)),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything within a nested value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    made = copy.deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = by
    return made


def test_any_value_of_any_kind_in_any_place_leaves_a_page(
    write_run: Any, make_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    """Each place of each file gets some of the wrong values; what is drawn are numbers by then, so nothing is drawn."""
    monkeypatch.setattr(logging.getLogger("torchspec"), "disabled", True)
    files = make_files(3)
    sound = write_run(tmp_path / "sound", files)
    run = write_run(tmp_path / "run", files)
    tried = 0
    for name in files:
        for number, path in enumerate(places(files[name])):
            for turn in range(3):
                bad = WRONG[(7 * number + 5 * turn + len(path)) % len(WRONG)]
                write_run(run, {name: replaced(files[name], path, bad)})
                pages = [write_report(run)] + ([write_comparison([run, sound])] if turn == 0 else [])
                for page in pages:
                    assert b"<script" not in page.read_bytes(), (name, path, bad)
                tried += 1
        write_run(run, {name: files[name]})
    assert tried > 400


def test_extreme_figures_are_drawn(write_run: Any, make_files: Any, tmp_path: Path) -> None:
    files = make_files(3)
    for step, row in zip((0, 5, 2**53 - 1), files["metrics.jsonl"], strict=False):
        row |= {"step": step, "tokens": 10**12 * step, "loss": -1e299, "lr": 0.0, "grad_norm": 1e-300}
        row |= {"accuracy_per_position": [1e200, None, 0.5], "time": {"$x_{": 1.0, HOSTILE * 9: 2.0, "nothing": 0.0}}
    files["eval.json"] |= {"acceptance_per_position": [7.0, -3.0, None], "sweep": [{"draft_length": 1e9, "speedup": 0}]}
    text = write_report(write_run(tmp_path / "run", files)).read_text()
    assert text.count("<figure") >= 15
    assert "<script" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", None),
        (b'{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "tra', None),  # the row that is being written
        (b"\x89PNG\r\n\x1a\n\x00\x00\n\xff\xfe\n", "metrics.jsonl: 4 of 4 lines are no rows of a run"),
        (b"step,loss\n1,2\n", "metrics.jsonl: 2 of 2 lines are no rows of a run"),
        (b'{"step": 1, "loss": 2}\n{"kind": "train", "step": 1}\n', "metrics.jsonl: 1 of 2 lines are no rows of a run"),
        (b"[" * 100_000 + b"\n", "metrics.jsonl: 1 of 1 lines are no rows of a run"),
        (b'{"kind": "train", "step": -1}\n{"kind": "train", "step": 1' + b"0" * 5000 + b"}\n", "2 of 2 lines"),
    ],
)
def test_a_foreign_metrics_file_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes, said: str | None
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with caplog.at_level(logging.WARNING):
        page = write_report(tmp_path).read_text()
    assert len(caplog.records) == (said is not None)
    assert ("Left out of this page" in page) == (said is not None)
    if said is not None:
        assert said in page
        assert said in caplog.text


def test_files_that_cannot_be_taken_for_a_runs_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    (tmp_path / "eval.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "environment.json").write_text("[" * 100_000)
    (tmp_path / "config.yaml").write_text("a: &a [*a]")
    (tmp_path / "data.json").write_bytes(b"")
    os.truncate(tmp_path / "data.json", 2**27)  # zeros that take no space
    with caplog.at_level(logging.WARNING):
        page = write_report(tmp_path).read_text()
    for name in ("eval.json", "environment.json", "config.yaml", "data.json"):
        assert f"{name} is damaged and left out of the report" in page
        assert f"{name} is damaged and left out of the report" in caplog.text
    assert "<h2>Loss</h2>" in page


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TorchspecError, match="is not a run directory"):
        write_report(tmp_path)


def test_a_long_run_is_held_in_little_and_summed_whole(tmp_path: Path) -> None:
    """Every row counts in the sums; of the curves every so many rows are kept, the first and the last among them."""
    rows = 20_000
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            peak = 2**30 if step == 11_417 else 2**20
            row = {
                "kind": "train", "step": step, "tokens": 10 * step, "loss": 1 / step, "step_seconds": 0.5,
                "time": {"forward": 0.25, "backward": 0.75}, "memory": {"peak": peak},
                "quarantined": {"a": "b"} if step % 1000 == 7 else {},
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    record = read_run(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000_000  # the file has 4 MB, and its rows as objects some ten times that
    steps = [row["step"] for row in record.train]
    assert KEPT <= len(steps) <= 2 * KEPT + 1
    assert (steps[0], steps[-1]) == (1, rows)
    assert {b - a for a, b in pairwise(steps[:-1])} == {record.stride}
    totals = record.totals
    assert (totals.rows, totals.quarantined, totals.peak) == (rows, 20, 2**30)
    assert totals.seconds == pytest.approx(rows / 2)
    assert totals.time == pytest.approx({"forward": rows / 4, "backward": rows * 0.75})
    page = write_report(tmp_path)
    assert page.stat().st_size < 1_500_000
    assert f"One step in {record.stride} is drawn." in page.read_text()
