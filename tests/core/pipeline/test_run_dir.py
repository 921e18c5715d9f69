from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.errors import TorchspecError
from torchspec.core.pipeline import run_dir


def test_a_new_directory_is_made_and_locked_against_a_second_process(make_config: Any, tmp_path: Path) -> None:
    config, _ = make_config(tmp_path / "a" / "b")
    run = run_dir.open_run(config)
    assert run.checkpoints.is_dir()
    program = f"import fcntl; fcntl.flock(open({str(run.path / '.lock')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 1
    with pytest.raises(TorchspecError, match="another process is training in"):
        run_dir.open_run(config)
    run.lock.close()
    run_dir.open_run(config).lock.close()


def test_what_a_run_would_overwrite_is_not_touched(make_config: Any, tmp_path: Path) -> None:
    config, _ = make_config(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")  # harmless: a run writes nothing of this name
    run_dir.open_run(config).lock.close()
    (tmp_path / "metrics.jsonl").write_text("another program's")
    (tmp_path / "checkpoints").rmdir()
    with pytest.raises(TorchspecError, match=r"holds metrics\.jsonl, which a run would overwrite, but no run"):
        run_dir.open_run(config)
    assert (tmp_path / "metrics.jsonl").read_text() == "another program's"
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(TorchspecError, match=r"holds config\.yaml, which a run would overwrite"):
        run_dir.open_run(config)


def test_an_output_that_is_a_file_or_unwritable_is_named(make_config: Any, tmp_path: Path) -> None:
    config, _ = make_config(tmp_path / "x")
    (tmp_path / "x").write_text("")
    with pytest.raises(TorchspecError, match="x is a file"):
        run_dir.open_run(config)
    inside = config.model_copy(update={"output": tmp_path / "x" / "y"})
    with pytest.raises(TorchspecError, match="cannot be written"):
        run_dir.open_run(inside)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--device", "cpu"], ["train", "--device", "cpu"]),
        (["tracker.api_key=abc", "train.lr=1"], ["tracker.api_key=***", "train.lr=1"]),
        (["--hub-token", "abc", "x"], ["--hub-token", "***", "x"]),
        (["--password=abc"], ["--password=***"]),
        (["eval.max_new_tokens=6", "--credentials=a"], ["eval.max_new_tokens=6", "--credentials=***"]),
    ],
)
def test_secrets_do_not_enter_the_record(words: list[str], shown: list[str]) -> None:
    assert run_dir.command_line(words) == shown


def test_a_session_says_how_it_ended(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised goes on its way; secrets and endless messages do not enter the record."""
    config, provenance = make_config(tmp_path)
    run = run_dir.open_run(config)
    monkeypatch.setenv("SOME_API_KEY", "sesame-sesame")
    message = "no sesame-sesame at http://me:key@host " + "x" * 9000
    for raised in (TorchspecError(message), KeyboardInterrupt(), ValueError()):
        run_dir.record_session(run, config, provenance, {}, 3, 9)
        with pytest.raises(type(raised)), run_dir.failure_recorded(run, lambda: 5):
            raise raised
    run_dir.record_session(run, config, provenance, {}, 5, 9)
    with run_dir.failure_recorded(run, lambda: 9):
        run_dir.record_end(run, "finished", 9)
    run_dir.record_session(run, config, provenance, {}, 9, 9)  # is killed
    run.lock.close()
    sessions = json.loads((tmp_path / "environment.json").read_text())["sessions"]
    ends = [session.get("ended") for session in sessions]
    assert [(end["how"], end["step"]) for end in ends[:-1]] == [
        ("failed", 5),
        ("stopped", 5),
        ("failed", 5),
        ("finished", 9),
    ]
    assert ends[-1] is None
    assert ends[0]["cause"].startswith("no *** at http://***@host xxx")
    assert len(ends[0]["cause"]) == run_dir.LONGEST_CAUSE
    assert [end["cause"] for end in ends[1:-1]] == ["SIGINT", "ValueError", ""]
    assert [session["total_steps"] for session in sessions] == [9] * 5


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"sessions": []}', '{"sessions": [5]}'])
def test_an_end_that_cannot_be_recorded_hides_nothing(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    config, _ = make_config(tmp_path)
    run = run_dir.open_run(config)
    if text is not None:
        (tmp_path / "environment.json").write_text(text)
    with pytest.raises(TorchspecError, match="the cause"), run_dir.failure_recorded(run, lambda: 1):
        raise TorchspecError("the cause")
    run.lock.close()
    assert "does not say how this session ended" in caplog.text


def test_the_git_revision_is_that_of_the_code() -> None:
    here = Path(run_dir.__file__).parent
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "run_dir.py"], cwd=here, capture_output=True)
    revision = run_dir.git_revision()
    if tracked.returncode == 0:
        assert revision is not None
        assert revision.removesuffix("-dirty") == asked.stdout.strip()
    else:
        assert revision is None
    assert run_dir.versions()["python"] == ".".join(map(str, sys.version_info[:3]))
