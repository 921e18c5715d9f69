from __future__ import annotations

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
