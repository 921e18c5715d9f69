"""Whether a run has finished, goes on, was stopped, failed or was killed, and what a user can do then."""

from __future__ import annotations

import fcntl
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.core.report.record import RunRecord
from torchspec.core.report.values import listed, mapping, number
from torchspec.core.training.checkpoint_files import steps_on_disk

LOCK = ".lock"
SIGNALS = {"SIGINT": "by Ctrl-C (SIGINT)", "SIGTERM": "by SIGTERM, which schedulers send"}
KILLED = (
    "Its process ended without a word: killed (SIGKILL, most often for want of memory: `dmesg` or the scheduler's log "
    "says so), or the machine went down."
)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`kind`: finished, running, stopped, failed, killed, away (nobody here can tell), unknown (nothing is recorded).
    `told`: a sentence; `cause`: the failure's own message; `advice`: what to do."""

    kind: str
    told: str
    cause: str = ""
    advice: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing speaks against taking the figures for those of a finished run."""
        return self.kind in ("finished", "unknown")


def standing(record: RunRecord) -> Standing:
    """From the last session of environment.json, and from the lock that a running one holds."""
    sessions = listed(record.environment.get("sessions"))
    last = mapping(sessions[-1]) if sessions else {}
    if "total_steps" not in last:  # of no run, or of one whose sessions say nothing of their end
        return Standing(kind="unknown", told="")
    ended = mapping(last.get("ended"))
    place = _place(record, last, ended)
    how = ended.get("how")
    if how == "finished":
        return Standing(kind="finished", told=f"Finished {place}.")
    if how == "stopped":
        by = SIGNALS.get(str(ended.get("cause")), f"by {ended.get('cause')}")
        return Standing(kind="stopped", told=f"Stopped {by} {place}.", advice=_again(record))
    if how == "failed":
        cause = str(ended.get("cause", ""))
        return Standing(kind="failed", told=f"Failed {place}.", cause=cause, advice=_again(record))
    if _held(record.directory / LOCK):
        told = f"Still running, {place}: this page shows what was there when it was written."
        return Standing(kind="running", told=told, advice="Call `torchspec report` again for a newer one.")
    host = last.get("host")
    if host is not None and host != platform.node():
        told = f"Not finished, {place}: it goes on, or was killed; its machine ({host}) would know."
        return Standing(kind="away", told=told)
    return Standing(kind="killed", told=f"Killed {place}.", advice=f"{KILLED} {_again(record)}")


def _place(record: RunRecord, session: Any, ended: Any) -> str:
    """At which step of how many, and when."""
    step = ended.get("step", record.train[-1]["step"] if record.train else session.get("from_step", 0))
    at = f", {moment(ended['at'])}" if "at" in ended else ""
    return f"at step {number(step)} of {number(session['total_steps'])}{at}"


def moment(at: object) -> str:
    """A recorded time as people read it."""
    return str(at).replace("T", " ").replace("+00:00", " UTC")


def _again(record: RunRecord) -> str:
    steps = steps_on_disk(record.directory / "checkpoints")
    if not steps:
        return "The same command begins it anew: there is no checkpoint yet."
    return f"The same command continues it from the checkpoint of step {steps[-1]:,}."


def _held(lock: Path) -> bool:
    """Whether a process trains there: it holds the lock for itself. Asked by taking it for a moment, with others."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
