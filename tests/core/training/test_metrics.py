from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchspec.core.errors import TorchspecError
from torchspec.core.training.metrics import MetricsLog


def read(path: Path) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in map(json.loads, path.read_text().splitlines())]


def written(path: Path) -> None:
    with MetricsLog(path) as log:
        for step in (1, 2, 3, 4):
            log.write({"kind": "train", "step": step, "loss": 1.0 / step})
            if step % 2 == 0:
                log.write({"kind": "validation", "step": step})


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1})
    assert read(path) == [("train", 1)]
    log.close()


def test_a_resumed_run_cuts_what_it_will_tell_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path)
    MetricsLog(path, after_step=2, validated=True).close()
    assert read(path) == [("train", 1), ("train", 2), ("validation", 2)]
    MetricsLog(path, after_step=2, validated=False).close()  # its validation will run again
    assert read(path) == [("train", 1), ("train", 2)]
    MetricsLog(path).close()
    assert read(path) == []


def test_a_line_cut_short_by_a_kill_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path)
    path.write_text(path.read_text() + '{"kind": "train", "st')
    with MetricsLog(path, after_step=4, validated=True) as log:
        log.write({"kind": "train", "step": 5})
    assert read(path)[-2:] == [("validation", 4), ("train", 5)]


def test_lines_that_are_no_rows_go_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path)
    path.write_bytes(b'{"a": 1}\n[]\n{"kind": "train", "step": "1"}\n\xff\n' + path.read_bytes())
    MetricsLog(path, after_step=1).close()
    assert read(path) == [("train", 1)]
    assert "3 lines that are no rows of a run" in caplog.text


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"kind": "train", "step": 1, "a": float("nan"), "b": [1.0, float("inf")], "c": {"d": float("-inf")}})
    assert json.loads(path.read_text()) == {"kind": "train", "step": 1, "a": None, "b": [1.0, None], "c": {"d": None}}


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(TorchspecError, match=r"no-directory/metrics\.jsonl: No such file"):
        MetricsLog(tmp_path / "no-directory" / "metrics.jsonl")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - the log closes it
        with pytest.raises(TorchspecError, match=r"No space left on device.*newest checkpoint is intact"):
            log.write({"kind": "train", "step": 1})
