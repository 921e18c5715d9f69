"""CUDA's MPS daemon, played by a program of its name: that it is this run's alone, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchspec.core.errors import UnavailableError
from torchspec.devices.cuda import mps
from torchspec.devices.cuda.mps import CudaMps

# As the real one: with -f the daemon, without it a client that hands orders from its standard input over.
DAEMON = """#!{python}
import os, signal, sys, time
from pathlib import Path
place = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
assert os.environ["CUDA_MPS_LOG_DIRECTORY"] == str(place)
mood = Path({moods!r}).read_text()
if sys.argv[1:] == ["-f"]:
    if mood == "refuses":
        sys.exit(3)
    (place / "pid").write_text(str(os.getpid()))
    if mood != "silent":
        (place / "control").touch()
    while not (place / "quit").exists() or mood == "stubborn":
        time.sleep(0.02)
    (place / "control").unlink()
    sys.exit(0)
if not (place / "control").exists():
    sys.exit("Cannot find MPS control daemon process")
for order in sys.stdin.read().split():
    if order == "quit" and mood == "deaf":
        time.sleep(60)
    assert order in ("get_server_list", "quit"), order
    if order == "quit":
        (place / "quit").touch()
"""

Mood = Callable[[str], None]


@pytest.fixture
def mood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mood:
    """The program is on the path; say how it is to behave."""
    programs, moods = tmp_path / "bin", tmp_path / "mood"
    programs.mkdir()
    moods.write_text("fine")
    program = programs / mps.CONTROL
    program.write_text(DAEMON.format(python=sys.executable, moods=str(moods)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.delenv(mps.PIPES, raising=False)
    return lambda text: (moods.write_text(text), None)[1]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return b"mps-control" in Path(f"/proc/{pid}/cmdline").read_bytes()


def gone(pid: int) -> bool:
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def started(place: Path) -> int:
    return int((place / "pid").read_text())


def test_whether_it_can_be_had(mood: Mood, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CudaMps().available().ok
    monkeypatch.setenv(mps.PIPES, "/somewhere")
    assert CudaMps().available().reason == "CUDA_MPS_PIPE_DIRECTORY is set, and what is there is used"
    monkeypatch.delenv(mps.PIPES)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "is not on the path" in CudaMps().available().reason


def test_it_runs_until_it_is_stopped(mood: Mood, tmp_path: Path) -> None:
    """Two of them know nothing of each other."""
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    stops = [CudaMps().start(place) for place in places]
    pids = [started(place) for place in places]
    assert all(map(alive, pids))
    assert CudaMps().environment(places[0]) == {mps.PIPES: str(places[0]), mps.LOGS: str(places[0])}
    stops[0]()
    assert gone(pids[0])
    assert (places[0] / "quit").exists(), "it was not asked to end"
    assert alive(pids[1])
    stops[1]()
    assert gone(pids[1])


@pytest.mark.parametrize("how", ["stubborn", "deaf"])
def test_one_that_does_not_quit_is_killed(mood: Mood, tmp_path: Path, how: str) -> None:
    guard = subprocess.Popen(
        [sys.executable, "-P", "-c", GUARD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert guard.stdout is not None
    assert guard.stdin is not None
    mood(how)
    assert guard.stdout.readline() == "ready\n"
    pid = started(tmp_path)
    guard.stdin.close()
    assert guard.wait(20) == 0
    assert gone(pid)
    guard.stdout.close()


GUARD = """
import sys
from pathlib import Path
from torchspec.devices.cuda import mps
mps.STOP_SECONDS = 0.5
mps.START_SECONDS = 0.5
sys.exit(mps.guard(Path(sys.argv[1])))
"""


def test_one_that_ends_at_once_says_so(mood: Mood, tmp_path: Path) -> None:
    mood("refuses")
    with pytest.raises(UnavailableError, match=r"ended while it started \(exit code 3\)"):
        CudaMps().start(tmp_path)


def test_one_that_does_not_answer_is_ended(mood: Mood, tmp_path: Path) -> None:
    mood("silent")
    done = subprocess.run(
        [sys.executable, "-P", "-c", GUARD, str(tmp_path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "did not answer within 0 s" in done.stdout
    assert gone(started(tmp_path))


def test_it_does_not_outlive_a_process_that_is_killed(mood: Mood, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom torchspec.devices.cuda.mps import CudaMps\n"
        "CudaMps().start(Path(sys.argv[1]))\nprint('on', flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "on\n"
    pid = started(tmp_path)
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pid)
    parent.stdout.close()
