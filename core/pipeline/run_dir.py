"""The run directory: what is in it, who may use it, and what is written at the start of each session.

RUN/
    config.yaml        the resolved configuration; `--config` reads it back
    provenance.json    where each setting came from
    environment.json   versions, device, git revision, of the last session and of every one, with its command line,
                       starting step, and how it ended; a session without an end is going on, or was killed
    data.json          what became of the rows
    metrics.jsonl      see core/training/metrics.py
    ledger.jsonl       what became of each sample, by step: see core/training/ledger.py
    ledger.json        how it balances, at the end of the run
    probe.safetensors  a recorded piece of target features, for the export's self-check
    checkpoints/       see core/training/checkpoint_files.py
    .checkpointed      there has been a checkpoint
    trackers.json      the run's own id, by which trackers go on with it, and which they are
    draft/             the exported draft of the best (else the last) checkpoint
    report.html
"""

from __future__ import annotations

import fcntl
import logging
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import torch

from torchspec.core import settings
from torchspec.core.config.dump import to_yaml
from torchspec.core.config.schema import RunConfig
from torchspec.core.config.secrets import HIDDEN, hidden, is_secret
from torchspec.core.errors import CheckpointError, TorchspecError
from torchspec.core.training.checkpoint_files import DAMAGED, lost, read_json, write_json

logger = logging.getLogger(__name__)

CONFIG, PROVENANCE, ENVIRONMENT, DATA = "config.yaml", "provenance.json", "environment.json", "data.json"
LEDGER, BALANCE = "ledger.jsonl", "ledger.json"
METRICS, PROBE, CHECKPOINTS, DRAFT, LOCK = "metrics.jsonl", "probe.safetensors", "checkpoints", "draft", ".lock"
WRITTEN = (CONFIG, PROVENANCE, DATA, PROBE, DRAFT, METRICS, LEDGER, BALANCE)
LONGEST_CAUSE = 4000
"""Characters of a failure's message that are kept."""
DISTRIBUTIONS = ("torchspec", "torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """An opened run directory. `lock` is held until it is closed or the process ends."""

    path: Path
    lock: IO[str]

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def ledger(self) -> Path:
        return self.path / LEDGER


def open_run(config: RunConfig) -> RunDirectory:
    """Create the directory, or take up the run in it; rank 0 only.

    Raises TorchspecError when it cannot be written, another process is training in it, it holds files that a
    run would overwrite, or it holds a run and `train.resume` is `never`.
    """
    path = config.output
    reason = refusal(config)
    if reason is not None:
        raise TorchspecError(f"the output {path} {reason}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CHECKPOINTS).mkdir(exist_ok=True)
        lock = (path / LOCK).open("w")
    except OSError as error:
        raise TorchspecError(f"the run directory {path} cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise TorchspecError(f"another process is training in {path}: wait for it, or name another --output") from error
    return RunDirectory(path=path, lock=lock)


def refusal(config: RunConfig) -> str | None:
    """Why a run must not start in its output directory as it is; None if it may."""
    path = config.output
    if path.exists() and not path.is_dir():
        return "is a file: name a directory with --output"
    if is_run(path) and lost(path / CHECKPOINTS):
        return (
            "holds a run whose checkpoints are gone or damaged, and a run never starts over by itself: "
            "restore one into its checkpoints/ from a copy, move the directory away, or name another"
        )
    if is_run(path):
        if config.train.resume == "never":
            return "holds a run already, and train.resume is `never`: name another, or leave train.resume at `auto`"
        return None
    foreign = [name for name in WRITTEN if (path / name).exists()]
    if foreign:
        return f"holds {', '.join(foreign)}, which a run would overwrite, but no run: name another directory"
    return None


def is_run(path: Path) -> bool:
    """Other programs write a metrics.jsonl too: alone it makes no run of ours."""
    return (path / ENVIRONMENT).is_file() or ((path / METRICS).is_file() and (path / CHECKPOINTS).is_dir())


def record_session(
    run: RunDirectory,
    config: RunConfig,
    provenance: Mapping[str, str],
    environment: Mapping[str, Any],
    step: int,
    total_steps: int,
) -> None:
    """Write the resolved configuration, where it came from, and this session's circumstances."""
    path = run.path / ENVIRONMENT
    earlier = _earlier_sessions(path)
    session = {
        **environment,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "total_steps": total_steps,
        "command": command_line(settings.typed_command()),
    }
    try:
        write_json(path, {**environment, "sessions": [*earlier, session]})  # first: it makes the directory a run's
        (run.path / CONFIG).write_text(to_yaml(config, provenance), encoding="utf-8")
        write_json(run.path / PROVENANCE, dict(provenance))
    except OSError as error:
        raise TorchspecError(f"cannot write into {run.path}: {error.strerror}") from error


def record_end(
    run: RunDirectory | None, how: Literal["finished", "stopped", "failed"], step: int, cause: str = ""
) -> None:
    """Write into the last session how it ended; nothing on ranks without the run directory.

    What cannot be written is said in the log and raises nothing: the end itself is what matters.
    """
    if run is None:
        return
    path = run.path / ENVIRONMENT
    at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        recorded = read_json(path)
        recorded["sessions"][-1]["ended"] = {
            "how": how, "at": at, "step": step, "cause": hidden(cause)[:LONGEST_CAUSE],
        }  # fmt: skip
        write_json(path, recorded)
    except (CheckpointError, OSError, LookupError, TypeError) as error:
        logger.warning("%s does not say how this session ended: %s", path, error)


@contextmanager
def failure_recorded(run: RunDirectory | None, step: Callable[[], int]) -> Iterator[None]:
    """What is raised within goes on its way and into the last session's record, with the step that was reached."""
    try:
        yield
    except KeyboardInterrupt:
        record_end(run, "stopped", step(), "SIGINT")
        raise
    except Exception as error:
        record_end(run, "failed", step(), str(error) or type(error).__name__)
        raise


def _earlier_sessions(path: Path) -> list[Any]:
    """Of environment.json; a damaged one is set aside, for it is a record and nothing depends on it."""
    if not path.is_file():
        return []
    try:
        sessions = read_json(path).get("sessions", [])
        if isinstance(sessions, list):
            return sessions
        reason = f"its sessions are a {type(sessions).__name__}, expected a list"
    except CheckpointError as error:
        reason = str(error)
    aside = path.with_name(path.name + DAMAGED)
    logger.warning("%s is begun anew, the old one renamed %s: %s", path, aside.name, reason)
    path.replace(aside)
    return []


def versions() -> dict[str, str]:
    """Versions that a run's result may depend on."""
    found = {name: metadata.version(name) for name in DISTRIBUTIONS}
    return {"python": platform.python_version(), **found}


def describe_environment(device: str, torch_device: torch.device, world_size: int) -> dict[str, Any]:
    """Flat facts about where a run takes place."""
    name = platform.processor() or platform.machine()
    if torch_device.type != "cpu":
        name = str(torch.get_device_module(torch_device).get_device_name(torch_device))
    return {
        **versions(),
        "git_revision": git_revision(),
        "device": device,
        "device_name": name,
        "ranks": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "platform": platform.platform(),
        "host": platform.node(),
    }


def git_revision() -> str | None:
    """The revision torchspec itself runs from, "-dirty" if tracked files differ; None where it is not a checkout."""
    here = Path(__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        revision = _git(here.parent, "rev-parse", "HEAD")
        dirty = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", ":/")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("-dirty" if dirty else "")


def _git(directory: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=directory, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def command_line(words: Sequence[str]) -> list[str]:
    """The words of a command with the values of anything named like a secret blanked."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = is_secret(name)
        if hide_next:
            shown.append(HIDDEN)
        elif equals and secret:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(word)
        hide_next = secret and not equals and word.startswith("-")
    return shown
