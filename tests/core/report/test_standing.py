"""What a page says of how a run ended, and of one that has not."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.report.compare import figures, incomparable
from torchspec.core.report.html import write_report
from torchspec.core.report.record import read_run
from torchspec.core.report.standing import standing

AT = "2026-01-02T04:04:05+00:00"
pytestmark = pytest.mark.usefixtures("undrawn")
HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def ended(files: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The files of a run that ended so; without a word where nothing is given."""
    session = files["environment.json"]["sessions"][0] | {"host": platform.node()}
    session.pop("ended")
    files["environment.json"]["sessions"] = [session | ({"ended": {"at": AT, "cause": "", **how}} if how else {})]
    return files


def banner(page: Path) -> str:
    """What stands out of the page, "" if nothing does."""
    text = page.read_text()
    return text[text.index('role="status">') : text.index("</section>")] if 'role="status"' in text else ""


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ({"how": "stopped", "step": 12, "cause": "SIGINT"}, "stopped", "Stopped by Ctrl-C (SIGINT) at step 12 of 30, "),
        ({"how": "stopped", "step": 12, "cause": "SIGTERM"}, "stopped", "Stopped by SIGTERM, which schedulers send at"),
        (
            {"how": "failed", "step": 12, "cause": "no <space>"},
            "failed",
            "Failed at step 12 of 30, 2026-01-02 04:04:05",
        ),
        ({}, "killed", "Killed at step 30 of 30."),
    ],
)
def test_a_run_that_did_not_finish_says_so_with_the_cause_and_the_remedy(
    write_run: Any, files: dict[str, Any], tmp_path: Path, how: dict[str, Any], kind: str, said: str
) -> None:
    run = write_run(tmp_path / "run", ended(files, **how))
    page = write_report(run)
    assert standing(read_run(run)).kind == kind
    assert said in banner(page)
    assert "The same command begins it anew: there is no checkpoint yet." in banner(page)
    assert "Finished" not in page.read_text()
    if kind == "failed":
        assert '<pre class="text">no &lt;space&gt;</pre>' in banner(page)
    if kind == "killed":
        assert "SIGKILL" in banner(page)
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert "continues it from the checkpoint of step 10." in banner(write_report(run))


def test_a_run_that_finished_says_so_without_alarm(write_run: Any, files: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", files))
    assert banner(page) == ""
    assert "Finished at step 30 of 30, 2026-01-02 04:04:05 UTC." in page.read_text()


def test_the_last_session_counts(write_run: Any, files: dict[str, Any], tmp_path: Path) -> None:
    first = files["environment.json"]["sessions"][0]
    ended(files, how="failed", step=3, cause="later")
    files["environment.json"]["sessions"].insert(0, first)
    assert standing(read_run(write_run(tmp_path / "run", files))).kind == "failed"


def test_a_run_goes_on_as_long_as_its_lock_is_held(write_run: Any, files: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ended(files))
    lock = run / ".lock"
    lock.touch()
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        page = write_report(run)
        holder.communicate(b"\n")
    assert "Still running, at step 30 of 30" in banner(page)
    assert standing(read_run(run)).kind == "killed"


def test_of_a_run_on_another_machine_nobody_can_tell(write_run: Any, files: dict[str, Any], tmp_path: Path) -> None:
    ended(files)["environment.json"]["sessions"][0]["host"] = "node17"
    assert "its machine (node17) would know" in banner(write_report(write_run(tmp_path / "run", files)))


@pytest.mark.parametrize("sessions", [[], [{"started": "x"}], [5], "x", None])
def test_where_nothing_is_recorded_nothing_is_said(
    write_run: Any, files: dict[str, Any], tmp_path: Path, sessions: Any
) -> None:
    files["environment.json"]["sessions"] = sessions
    page = write_report(write_run(tmp_path / "run", files))
    assert banner(page) == ""
    assert "Finished" not in page.read_text()


def test_a_comparison_names_runs_that_have_not_finished(
    write_run: Any, make_files: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    runs = {
        "whole": read_run(write_run(tmp_path / "whole", files)),
        "broken": read_run(write_run(tmp_path / "broken", ended(make_files(), how="failed", step=3))),
    }
    (warning,) = incomparable(runs)
    assert warning.startswith("broken is not a finished run. Failed at step 3 of 30")
    assert dict(figures(runs))["state"] == [("finished", ""), ("failed", "")]
