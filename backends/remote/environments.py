"""Environments of target engines: one per engine and device, apart from the trainer's and from each other.

`<engines_dir>/<engine>-<device>` is a virtual environment. Its marker file is written last and removed first, so that
one that was left half-made counts as none.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from torchspec.backends.remote import pins
from torchspec.backends.remote.installation import Installation, check_python
from torchspec.backends.remote.staging import stage
from torchspec.core.errors import TorchspecError, UnavailableError
from torchspec.core.settings import engine_environment, engines_dir

MARKER = "torchspec-engine.json"

_IMPORT_SECONDS = 300.0
_ENTRANCES = {"vllm": "LLM", "sglang": "Engine"}
"""What is imported late by the engine itself, with nearly everything it needs."""

_IMPORT = """
import importlib, sys
engine, entrance, *shims = sys.argv[1:]
sys.path += shims
importlib.import_module("torchspec.core.workers")
module = importlib.import_module(engine)
if entrance:
    getattr(module, entrance)
print(f"\\n{module.__version__}")
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One that was installed to its end."""

    engine: str
    device: str
    path: Path
    python: Path
    """Its interpreter."""
    version: str
    """The engine's."""
    pins: str
    """The digest of the pins it was made from."""
    installed_at: str
    """ISO 8601, UTC."""

    @property
    def current(self) -> bool:
        """Whether this torchspec would install the same."""
        known = self.device in pins.devices(self.engine)
        return known and pins.read_pins(self.engine, self.device).digest == self.pins


def place(engine: str, device: str) -> Path:
    """Where the environment is, or would be."""
    return engines_dir().absolute() / f"{engine}-{device}"


def installed() -> list[Environment]:
    """Every one on this machine, by name."""
    found = [_read(marker) for marker in sorted(engines_dir().absolute().glob(f"*/{MARKER}"))]
    return [environment for environment in found if environment is not None]


def find(engine: str, device: str) -> Environment | None:
    """None where there is none, or a half-made one."""
    return _read(place(engine, device) / MARKER)


def _read(marker: Path) -> Environment | None:
    path = marker.parent
    try:
        facts = json.loads(marker.read_text(encoding="utf-8"))
        return Environment(**facts, path=path, python=_interpreter(path))
    except (OSError, ValueError, TypeError):  # none, cut off, or of another torchspec
        return None


def _interpreter(path: Path) -> Path:
    return path / "bin" / "python"


def install(engine: str, device: str, *, base_python: Path, say: Callable[[str], None]) -> Environment:
    """The environment, made by `base_python` unless a current one is there in which nothing is wrong.

    Several processes may ask at a time: one works, the others wait. `say` is told what is going on.

    Raises UnavailableError where none is known for the engine and device, or `base_python` is not one for it, and
    TorchspecError when the installation fails, with the end of pip's output.
    """
    pinned = pins.read_pins(engine, device)
    if not pinned.complete:
        raise UnavailableError(
            f"{engine} for {device} is on no package index\n    remedy: install it by hand, as {pinned.path} says, and "
            "name the Python that it is in: engine.python=/path/to/python"
        )
    path = place(engine, device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TorchspecError(
            f"no environment can be made in {path.parent} (TORCHSPEC_ENGINES): {error.strerror}"
        ) from error
    with _lock(path, say) as lock:
        there = find(engine, device)
        if there is not None and there.current:
            say(f"looking at {path}, which is there already")
            wrong = check(there)
            if not wrong:
                say(f"nothing to do: {engine} {there.version} for {device} is in {path}")
                return there
            say(f"making it anew: {wrong[0]}")
        check_python(base_python, pinned)
        return _make(pinned, Installation(path=path, lock=lock.fileno(), say=say), base_python)


def _make(pinned: pins.Pins, installation: Installation, base_python: Path) -> Environment:
    started = time.monotonic()
    path, say = installation.path, installation.say
    (path / MARKER).unlink(missing_ok=True)
    if path.exists():
        say(f"removing what is in {path}")
        shutil.rmtree(path)
    installation.run(pinned, base_python, _interpreter(path))
    environment = Environment(
        engine=pinned.engine,
        device=pinned.device,
        path=path,
        python=_interpreter(path),
        version="",
        pins=pinned.digest,
        installed_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    say(f"importing {pinned.engine} there, to see that it works")
    environment = dataclasses.replace(environment, version=_import(environment))
    wrong = _strangeness(environment, environment.version)
    if wrong:
        raise TorchspecError(f"{path} does not hold what was asked for: {wrong}\n    see {installation.log}")
    _mark(environment)
    say(f"done in {time.monotonic() - started:.0f} s: {pinned.engine} {environment.version} for {pinned.device}")
    return environment


def _mark(environment: Environment) -> None:
    facts = {name: value for name, value in vars(environment).items() if name not in ("path", "python")}
    aside = environment.path / f"{MARKER}.new"
    aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, environment.path / MARKER)


def check(environment: Environment) -> list[str]:
    """What is wrong with it, each with what to do; [] for nothing."""
    engine, device = environment.engine, environment.device
    again = f"run `torchspec engine install {engine} --device {device}`"
    if not environment.python.exists():
        return [f"its interpreter {environment.python} is gone: {again}"]
    wrong = []
    try:
        strange = _strangeness(environment, _import(environment))
    except TorchspecError as error:
        wrong.append(str(error))
    else:
        if strange:
            wrong.append(f"{strange}: {again}")
    if device not in pins.devices(engine):
        wrong.append(f"this torchspec knows no environment of {engine} for {device}: remove it")
    elif not environment.current:
        wrong.append(f"it was made from other versions than those this torchspec is tested with: {again}")
    return wrong


def _strangeness(environment: Environment, version: str) -> str | None:
    """How the version found differs from the one expected; local parts (`+cpu`) say how it was built."""
    engine, device = environment.engine, environment.device
    shipped = pins.read_pins(engine, device).version if device in pins.devices(engine) else None
    expected = shipped or environment.version
    if version.partition("+")[0] == expected.partition("+")[0]:
        return None
    return f"{engine} is of version {version} there, and {expected} is what torchspec is tested with"


def _import(environment: Environment) -> str:
    """The version of the engine that its interpreter imports; TorchspecError when it can't."""
    engine, python = environment.engine, environment.python
    staged = stage()
    shims = staged / "torchspec" / "backends" / engine / "worker" / f"{environment.device}_shims"
    command = [str(python), "-P", "-c", _IMPORT, engine, _ENTRANCES.get(engine, "")]
    try:
        done = subprocess.run(
            [*command, *([str(shims)] if shims.is_dir() else [])],
            env=engine_environment(folders=[staged]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TorchspecError(f"{python} did not finish importing {engine} within {_IMPORT_SECONDS:.0f} s") from error
    except OSError as error:
        raise TorchspecError(f"{python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise TorchspecError(
            f"{python} cannot import {engine}: {said[0]}\n    remedy: `torchspec engine install {engine} --device "
            f"{environment.device}` makes the environment anew"
        )
    return done.stdout.splitlines()[-1]


def remove(engine: str, device: str) -> None:
    """Remove the environment, a half-made one too. TorchspecError when there is none, or one is being made."""
    path = place(engine, device)
    if not path.exists():
        raise TorchspecError(f"there is no environment of {engine} for {device}: {path} does not exist")
    with _lock(path, None):
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
        _beside(path, ".log").unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _lock(path: Path, say: Callable[[str], None] | None) -> Iterator[IO[str]]:
    """Hold the environment's lock, which dies with the processes that have it open. Without `say`, don't wait."""
    with _beside(path, ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if say is None:
                raise TorchspecError(
                    f"{path} is being installed by another process: wait for it, or stop it"
                ) from error
            say(f"waiting for another process that is installing into {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
