"""The quick start on a tiny target: everything it promises is there, and it can be given again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from torchspec.cli import main
from torchspec.cli.commands.quickstart import move_aside

SMALL = ("train.max_steps=3", "train.batch_size=4", "draft.unroll=2", "draft.vocab_size=64", "data.max_length=96")
DECODING = ("--samples", "3", "--max-new-tokens", "6", "--sweep", "1", "2", "--device", "cpu")
KEYS = {
    "acceptance_length",
    "acceptance_per_position",
    "tokens_per_second",
    "tokens_per_second_draftless",
    "speedup",
    "lossless",
    "sweep",
    "prompt_lookup",
}

Quickstart = Callable[..., tuple[str, str]]


def write_rows(path: Path, count: int) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(count):
        turns = [
            {"role": "user", "content": f"value {n}"},
            {"role": "assistant", "content": "the quick fox " * (1 + n % 3)},
        ]
        rows.append({"id": f"{path.stem}{n}", "messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run directory whose conversations are already there: the library's would take longer than all the rest."""
    (tmp_path / "run" / "data").mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 3), ("test", 6)):
        write_rows(tmp_path / "run" / "data" / f"{split}.jsonl", count)
    return tmp_path / "run"


@pytest.fixture
def quickstart(tmp_path: Path, output: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> Quickstart:
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> tuple[str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(
                ["quickstart", "--output", str(output), *DECODING, f"target.path={tiny_target}", *SMALL, *words]
            )
        assert code == 0, err.getvalue()
        return out.getvalue(), err.getvalue()

    return run


def steps(output: Path) -> list[int]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def test_a_quick_start_leaves_everything_and_runs_again(quickstart: Quickstart, output: Path) -> None:
    table, said = quickstart("--answers", "0", "--nproc", "1")
    result = json.loads((output / "eval.json").read_text())
    assert set(result) >= KEYS
    assert result["lossless"] is True
    assert result["acceptance_length"] == pytest.approx(1 + sum(result["acceptance_per_position"]))
    assert {row["draft_length"] for row in result["sweep"]} == {1, 2, 5}
    assert steps(output) == [1, 2, 3]
    for name in ("report.html", "draft/config.json", "checkpoints/best.json", "config.yaml"):
        assert (output / name).is_file(), name
    assert f"{result['acceptance_length']:.2f}" in (output / "report.html").read_text()
    assert "# quickstart.yaml:" in (output / "config.yaml").read_text()
    for word in ("acceptance length", "tokens/s", "speed-up", "lossless", "prompt lookup", "no draft"):
        assert word in table
    for word in ("1/5", "2/5", "3/5", "4/5", "5/5", str(output / "report.html")):
        assert word in said

    (output / "eval.json").unlink()
    result = json.loads(quickstart("--answers", "0", "--nproc", "1", "--json")[0])
    assert result == json.loads((output / "eval.json").read_text())
    assert steps(output) == [1, 2, 3], "the finished training is not done again"


def test_an_earlier_run_is_moved_aside_not_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "note").write_text(str(number))
        move_aside(tmp_path / "run")
    move_aside(tmp_path / "run")  # nothing there: nothing to do
    assert [(tmp_path / f"run.{number}" / "note").read_text() for number in (1, 2)] == ["1", "2"]
    assert f"the earlier run is now {tmp_path / 'run.2'}" in capsys.readouterr().err


def contents(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_everything_wrong_is_said_before_anything_is_touched(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--fresh` would have moved the run aside, and the conversations would have been built."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    words = ["quickstart", "--output", str(tmp_path / "run"), "--fresh", "--device", "cpu"]
    misfits = [f"target.path={tiny_target}", "draft.num_attention_heads=7", "data.max_length=4096"]
    for wrong, said in (
        (["--samples", "0", "train.lrr=1"], ("--samples", "train.lrr")),
        (["target.path=/nowhere"], ("target.path: no such directory",)),
        (misfits, ("draft.num_key_value_heads", "data.max_length")),
    ):
        assert main([*words, *wrong]) == 2
        text = capsys.readouterr().err
        assert "1/5" not in text
        for part in said:
            assert part in text
        assert contents(tmp_path) == ["run", "run/metrics.jsonl"]


def test_a_run_of_another_command_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "environment.json").write_text("{}")
    assert main(["quickstart", "--output", str(tmp_path), "--device", "cpu"]) == 2
    text = capsys.readouterr().err
    assert "holds a run that quickstart did not start" in text
    assert "--fresh" in text
    assert contents(tmp_path) == ["environment.json"]


def test_training_on_the_texts_as_they_are(quickstart: Quickstart, output: Path) -> None:
    quickstart("--answers", "0", "--nproc", "1")
    assert not list((output / "data").glob("generated-*.jsonl"))
    assert json.loads((output / "data.json").read_text())["files"] == [str(output / "data" / "train.jsonl")]


def test_an_earlier_run_of_other_settings_is_refused_before_the_target_answers(
    quickstart: Quickstart, output: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart("--answers", "5", "--nproc", "2")
    before = contents(output)
    words = ["quickstart", "--output", str(output), *DECODING, f"target.path={tiny_target}", *SMALL]
    for change, said in (
        (
            ["--answers", "5", "--nproc", "2", "train.batch_size=2"],
            "order.batch_size: the checkpoint has 4, this run 2",
        ),
        (["--answers", "4", "--nproc", "2"], "data.files: the checkpoint has ['generated-5-0.jsonl'"),
        (["--answers", "5", "--nproc", "1"], "this run ['generated-5-0.jsonl']"),
    ):
        assert main([*words, *change]) == 2
        text = capsys.readouterr().err
        assert said in text
        assert "1/5" not in text
    assert contents(output) == before


def test_training_on_what_the_target_says(quickstart: Quickstart, output: Path) -> None:
    quickstart("--answers", "5", "--nproc", "2")
    files = sorted((output / "data").glob("generated-*.jsonl"))
    rows = [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in files]
    assert [sorted(ids) for ids in rows] == [["train0", "train4", "train9"], ["train2", "train7"]]
    assert json.loads((output / "data.json").read_text())["files"] == [str(file) for file in files]
    assert json.loads((output / "environment.json").read_text())["ranks"] == 2
