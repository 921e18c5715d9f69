"""The page of a run whose files are not all whole."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
from pathlib import Path

import pytest

from torchspec.core.errors import TorchspecError
from torchspec.core.report.html import write_report
from torchspec.core.report.record import read_run

ROWS = [{"kind": "train", "step": step, "loss": 2.0 / step, "accuracy_per_position": [0.5] * step} for step in (1, 2)]


def test_damaged_files_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps(row) for row in [*ROWS, {"a": 1}, [], {"kind": "train"}, {"kind": "train", "step": "x"}]]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff{")
    for name, text in (("environment.json", "{"), ("data.json", "[]"), ("config.yaml", "a: [")):
        (tmp_path / name).write_text(text)
    with caplog.at_level(logging.WARNING):
        record = read_run(tmp_path)
        write_report(tmp_path)
    assert record.train == ROWS
    assert record.environment == record.data == record.config == {}
    for name in ("environment.json", "data.json", "config.yaml"):
        assert f"{name} is damaged and left out of the report" in caplog.text


def test_every_series_of_a_chart_is_drawn(tmp_path: Path) -> None:
    row = {"kind": "train", "step": 1, "loss": 1.0, "accuracy_per_position": [0.5] * 20}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({**row, "step": step}) + "\n" for step in (1, 2)))
    (few := tmp_path / "few").mkdir()
    row["accuracy_per_position"] = [0.5] * 4
    (few / "metrics.jsonl").write_text("".join(json.dumps({**row, "step": step}) + "\n" for step in (1, 2)))
    drawn = re.compile(r"fill: none; [^\"]*stroke: var\(--c\d\)")
    lines = [len(drawn.findall(write_report(place).read_text())) for place in (tmp_path, few)]
    assert lines[0] - lines[1] >= 16


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "report.html").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TorchspecError, match=r"cannot write .*report\.html"):
            write_report(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_the_page_says_how_the_run_was_made(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    sessions = [{"command": ["/x/__main__.py", "train", "--output", "a b"]}, {"command": []}, {}, "damaged"]
    (tmp_path / "environment.json").write_text(json.dumps({"sessions": sessions}))
    text = write_report(tmp_path).read_text()
    assert '<pre class="command">torchspec train --output &#39;a b&#39;</pre>' in text
    assert "How to serve it" not in text, "there is no draft"


def test_decoded_texts_show_what_the_draft_had_right(tmp_path: Path) -> None:
    """Each piece once and escaped; what is no sample is left out, and so is a speed that was not measured."""
    pieces = [["def ", 0], ["<b>", 1], [" &", 2], ["late", 9]]
    sample = {"id": "<i>", "prompt": "</pre><script>", "pieces": pieces}
    broken = [{"id": "x", "pieces": [["y"]]}, "z", {"id": "x", "pieces": [[1, 2]]}]
    sweep = [{"draft_length": 2, "speedup": None, "acceptance_length": 1.5}]
    (tmp_path / "eval.json").write_text(json.dumps({"samples": [sample, *broken], "sweep": sweep}))
    page = write_report(tmp_path).read_text()
    assert page.count("tokens drafted</summary>") == 1
    assert "&lt;i&gt;: 3 of 4 tokens drafted" in page
    assert '<pre class="text">def <span class="drafted d1" title="drafted, 1 of its round">&lt;b&gt;</span>' in page
    assert '<span class="drafted d2" title="drafted, 2 of its round"> &amp;</span>' in page
    assert '<span class="drafted d5" title="drafted, 9 of its round">late</span></pre>' in page
    assert "<script>" not in page
    assert "<i>" not in page
    for wrong in ("none", {"a": 1}, 5):
        (tmp_path / "eval.json").write_text(json.dumps({"samples": wrong, "acceptance_length": 1.5}))
        assert "Decoded texts" not in write_report(tmp_path).read_text()
