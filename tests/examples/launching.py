"""What the tests of examples/launch share: the folder, the words of a small training, and its figures."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
LIMIT = 300.0
TEXT = "every function returns a new list of the values that are sorted"


def words(target: Path, output: Path) -> list[str]:
    """Of `torchspec train`: 12 steps on a CPU, with data and cache beside the run."""
    data, cache = output.with_name("conversations.jsonl"), output.with_name("cache")
    chats = [[("user", TEXT[n:]), ("assistant", TEXT[:n])] for n in range(20, 33)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--device=cpu", f"--target={target}", f"--data={data}", f"--output={output}",
        "train.batch_size=4", "train.micro_batch_size=2", "train.epochs=3", "train.checkpoint_every=2",
        "draft.vocab_size=128", "draft.unroll=2", f"data.cache_dir={cache}",
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """With the commands of this interpreter's environment first."""
    here = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


def start(command: Sequence[str | Path], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that all of it can be ended."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(map(str, command)),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
    code = process.wait(LIMIT)
    return code, log.read_text(errors="replace")


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Nodes drain when they are asked to; what is left of their sessions goes."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < until, log.read_text(errors="replace")
        time.sleep(0.05)


def steps(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def figures(output: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def free_port(low: int, high: int) -> int:
    for port in range(low + os.getpid() % 1000, high):
        with socket.socket() as held:
            try:
                held.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
