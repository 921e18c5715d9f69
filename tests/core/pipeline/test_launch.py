"""`--nproc`: real processes, signals, exit codes, output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from torchspec.core.errors import ConfigError
from torchspec.core.pipeline.launch import launch, torchspec_command

# A rank that needs no torch: the launcher's own behaviour, quickly.
PRELUDE = """
import os, pathlib, signal, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
place = pathlib.Path(sys.argv[1])
def note(text):
    with open(place / f"{rank}.log", "a") as file:
        file.write(text + "\\n")
"""


def command(directory: Path, body: str) -> list[str]:
    script = directory / "rank.py"
    script.write_text(PRELUDE + textwrap.dedent(body))
    return [sys.executable, str(script), str(directory)]


def wait_for(logs: list[Path], text: str) -> None:
    deadline = time.monotonic() + 60
    while not all(log.exists() and text in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_get_torchruns_environment(tmp_path: Path) -> None:
    body = """
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "TORCHELASTIC_USE_AGENT_STORE")
    note(" ".join([str(rank), str(world), *(os.environ[name] for name in names)]))
    """
    assert launch(command(tmp_path, body), 2) == 0
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    for rank in range(2):
        expected = f"{rank} 2 {rank} 2 127.0.0.1 {threads} True\n"
        assert (tmp_path / f"{rank}.log").read_text() == expected


def test_only_rank_0_is_heard_unless_another_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(command(tmp_path, "print('out', rank); print('err', rank, file=sys.stderr)"), 2) == 0
    heard = capfd.readouterr()
    assert (heard.out, heard.err) == ("out 0\n", "err 0\n")
    body = "if rank == 1: sys.exit('broken on purpose')\ntime.sleep(60)"
    start = time.monotonic()
    assert launch(command(tmp_path, body), 2) == 1
    assert time.monotonic() - start < 20  # rank 0 was told to go
    assert "rank 1 failed (exit code 1)\nrank 1 said:\nbroken on purpose" in capfd.readouterr().err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_with_its_signal_and_counts_as_128_plus_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], victim: int
) -> None:
    body = f"os.kill(os.getpid(), 9) if rank == {victim} else time.sleep(60)"
    assert launch(command(tmp_path, body), 2) == 137
    heard = capfd.readouterr().err
    assert f"rank {victim} was killed by signal 9 (SIGKILL, often for want of memory)" in heard
    assert "the same command continues from it" in heard
    assert "said:" not in heard


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_ranks_are_told_to_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    body = """
    from torchspec.core.pipeline.launch import follow_launcher
    follow_launcher()
    def stop(number, frame):
        note(f"signal {number}")
        sys.exit(0)
    signal.signal(15, stop)
    note("ready")
    time.sleep(60)
    """
    program = "import sys; from torchspec.core.pipeline.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    process = subprocess.Popen([sys.executable, "-c", program, *command(tmp_path, body)])
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    wait_for(logs, "ready")
    process.kill()
    process.wait()
    wait_for(logs, "signal 15")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_ranks_end_whose_launcher_was_killed_before_they_followed_it(tmp_path: Path) -> None:
    """They would wait for its rendezvous until their deadline."""
    body = """
    note("ready")
    while not (place / "go").exists():
        time.sleep(0.02)
    from torchspec.core.errors import TorchspecError
    from torchspec.core.pipeline.launch import follow_launcher
    try:
        follow_launcher()
    except TorchspecError as error:
        note(str(error))
    """
    program = "import sys; from torchspec.core.pipeline.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    process = subprocess.Popen([sys.executable, "-c", program, *command(tmp_path, body)])
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    wait_for(logs, "ready")
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    wait_for(logs, "the process that started this one has ended")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once_and_the_exit_code_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    """As from a terminal: the signal goes to the launcher's whole process group."""
    body = f"""
    def stop(number, frame):
        note(f"signal {{number}}")
        time.sleep(0.5)
        note("saved")
        sys.exit(128 + number)
    signal.signal({int(number)}, stop)
    note("ready")
    time.sleep(60)
    """
    program = "import sys; from torchspec.core.pipeline.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    process = subprocess.Popen([sys.executable, "-c", program, *command(tmp_path, body)], start_new_session=True)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    wait_for(logs, "ready")
    os.killpg(process.pid, number)
    assert process.wait(30) == 128 + number
    assert [log.read_text().splitlines() for log in logs] == [["ready", f"signal {int(number)}", "saved"]] * 2


def test_ranks_that_do_not_stop_in_time_are_killed(tmp_path: Path) -> None:
    body = """
    signal.signal(15, signal.SIG_IGN)
    note("ready")
    while rank == 0 and not (place / "1.log").exists():
        time.sleep(0.05)
    if rank == 0:
        os.kill(os.getppid(), 15)
    time.sleep(60)
    """
    start = time.monotonic()
    assert launch(command(tmp_path, body), 2, shutdown_seconds=1.0) == 137
    assert time.monotonic() - start < 20


def test_a_module_in_the_working_directory_hides_none_of_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "difflib.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert launch(torchspec_command(["--version"]), 1) == 0


def test_no_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="nproc: at least one process"):
        launch(["true"], 0)
