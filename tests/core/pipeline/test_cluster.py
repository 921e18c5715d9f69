"""Engines and ranks on a real Ray cluster of this machine, and features through a real Mooncake store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.errors import TorchspecError, UnavailableError
from torchspec.core.pipeline import cluster, run_dir
from torchspec.core.pipeline.engine_setup import ENGINE

pytest.importorskip("ray", reason='pip install "torchspec[ray]"')

MARK = "TORCHSPEC_TEST_RUN"
LIMIT = 240.0
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def start(tiny_target: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """start(output, words...): `torchspec train` of 12 steps in a process of its own; its log is OUTPUT.log."""

    cache = tmp_path_factory.mktemp("cache")

    def run(output: Path, *words: str) -> subprocess.Popen[bytes]:
        settings = [
            "--device=cpu", f"--target={tiny_target}", f"--data={conversations / 'train.jsonl'}", f"--output={output}",
            "train.batch_size=4", "train.micro_batch_size=2", "train.epochs=3", "train.checkpoint_every=2",
            "draft.vocab_size=128", "draft.unroll=2", f"data.cache_dir={cache}",
        ]  # fmt: skip
        with Path(f"{output}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "torchspec", "train", *settings, *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: str(output)},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    return run


@pytest.fixture(scope="module")
def alone(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert ended(start(output), output)[0] == 0
    return output


def ended(process: subprocess.Popen[bytes], output: Path) -> tuple[int, str]:
    return process.wait(LIMIT), Path(f"{output}.log").read_text()


def marked(output: Path, words: str = "") -> list[int]:
    """Processes of the run whose command line holds these words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                variables, line = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{MARK}={output}".encode() in variables.split(b"\0") and words.encode() in line.replace(b"\0", b" "):
                found.append(int(entry.name))
    return found


def numbers(output: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until
        time.sleep(0.02)


def kill_at(step: int, output: Path, process: subprocess.Popen[bytes], *kinds: str) -> None:
    """One process of each kind, when the run has come so far."""
    metrics = output / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step, process)
    for words in kinds:
        wait_for(partial(others, process.pid, output, words), process)
        os.kill(others(process.pid, output, words)[0], signal.SIGKILL)


def others(pid: int, output: Path, words: str) -> list[int]:
    """As `marked`, without this one."""
    return [each for each in marked(output, words) if each != pid]


def check_ledger(output: Path) -> None:
    found = json.loads((output / "ledger.json").read_text())
    assert (found["read"], found["samples"], found["wrong"]) == (13, 13, [])
    assert [(e["trained"], e["quarantined"], e["left"]) for e in found["epochs"]] == [(13, 0, 0)] * 3


@pytest.mark.slow
def test_the_same_numbers_whatever_is_killed(start: Start, alone: Path, tmp_path: Path) -> None:
    """An engine and the rank, the Mooncake master and the actor of an engine, and the actor of the rank."""
    pytest.importorskip("mooncake.store", exc_type=ImportError, reason='pip install "torchspec[mooncake]"')
    apart = tmp_path / "apart"
    words = ("--topology=disaggregated", "--engines=2", "pipeline.store=mooncake", "engine.store_mb=64")
    process = start(apart, *words, "pipeline.prefetch_mb=1")
    kill_at(3, apart, process, "torchspec.core.workers", "-m torchspec train")
    kill_at(5, apart, process, "mooncake_master", "ray::EngineAgent")
    kill_at(8, apart, process, "ray::RankAgent")
    code, log = ended(process, apart)
    assert code == 0, log
    assert log.count("all ranks start again") >= 2
    assert numbers(apart) == numbers(alone)
    check_ledger(apart)
    wait_for_none(apart)


@pytest.mark.slow
def test_a_signal_stops_it_with_a_checkpoint_and_the_same_command_goes_on(
    start: Start, alone: Path, tmp_path: Path
) -> None:
    apart = tmp_path / "apart"
    words = ("--topology=disaggregated",)
    process = start(apart, *words)
    wait_for(lambda: (apart / "metrics.jsonl").exists() and (apart / "metrics.jsonl").read_text(), process)
    process.send_signal(signal.SIGTERM)
    code, log = ended(process, apart)
    assert code == 128 + signal.SIGTERM, log
    wait_for_none(apart)
    process = start(apart, *words)
    wait_for(lambda: "resuming" in Path(f"{apart}.log").read_text(), process)
    process.kill()  # the driver: what it started must not outlive it
    process.wait()
    wait_for_none(apart)
    code, log = ended(start(apart, *words), apart)
    assert code == 0, log
    assert numbers(apart) == numbers(alone)
    check_ledger(apart)


def wait_for_none(output: Path) -> None:
    """Ours; Ray's own agents need a little longer."""
    until = time.monotonic() + 60
    while marked(output, "torchspec") or marked(output, "mooncake_master"):
        assert time.monotonic() < until, "processes are left"
        time.sleep(0.1)


def test_no_room(start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ("--topology=disaggregated", "ray.resource=quantum_chip", "ray.start_timeout=1")
    code, log = ended(start(output, *words), output)
    assert code == 1
    assert "the cluster had no room for the run within 1 s (ray.start_timeout): it needs {" in log
    assert "'quantum_chip': 2" in log
    assert "Traceback" not in log


def test_without_ray(monkeypatch: pytest.MonkeyPatch, make_config: Any, tmp_path: Path) -> None:
    config, _ = make_config(tmp_path / "run", "pipeline.topology=disaggregated")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnavailableError, match=r"remedy: pip install 'torchspec\[ray\]'"):
        cluster.run(config, [], print)


def test_another_run_in_the_same_directory_is_left_alone(make_config: Any, tmp_path: Path) -> None:
    """Its engines are found through that directory."""
    config, _ = make_config(tmp_path / "run", "pipeline.topology=disaggregated")
    first = run_dir.open_run(config)
    (config.output / ENGINE / "engine-0").mkdir(parents=True)
    with pytest.raises(TorchspecError, match="another process is training in"):
        cluster.run(config, [], print)
    first.lock.close()
    assert (config.output / ENGINE / "engine-0").is_dir()
