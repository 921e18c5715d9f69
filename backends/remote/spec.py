"""The registry's description of an engine that runs in a worker: how it is found, started and asked."""

from __future__ import annotations

import logging
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.backends.api import (
    Availability,
    EngineOptions,
    EngineProcess,
    EngineSpec,
    ServingEngine,
    StartedEngine,
    StreamedEngine,
    TargetEngine,
    UnavailableError,
)
from torchspec.core import settings
from torchspec.core.workers.protocol import TOKEN_VARIABLE

if TYPE_CHECKING:
    from torchspec.core.workers.remote_engine import RemoteEngine
    from torchspec.core.workers.starting import Program

log = logging.getLogger(__name__)

PROBE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`module` is what must be importable in the engine's environment, `runner` the module whose `make_runner` starts
    the engine there. `shims(device)`: folders under the staged code that go onto the engine's path on this device.
    `serving_command`, `pieces`: as `EngineSpec`'s."""

    name: str
    module: str
    runner: str
    shims: Callable[[str], tuple[str, ...]] = field(default=lambda device: ())
    serving_command: Callable[[str, Path, str, int], str] | None = None
    pieces: Mapping[str, Any] | None = None

    def spec(self) -> EngineSpec:
        return EngineSpec(
            name=self.name,
            probe=self.probe,
            load=self.load,
            capabilities=frozenset({"capture", "generate", "images", "serve"}),
            available=self.available,
            command=self.attach_command,
            serve=self.serve,
            start=self.start,
            attach=self.attach,
            serving_command=self.serving_command,
            pieces=self.pieces,
        )

    def probe(self) -> Availability:
        """Whether `torchspec engine install` made an environment, for any device."""
        from torchspec.backends.remote.environments import installed

        found = [each for each in installed() if each.engine == self.name]
        if not found:
            return Availability(ok=False, reason=f"no environment of {self.name} is installed", hint=self._hint("cpu"))
        listed = ", ".join(f"{self.name} {each.version} for {each.device}" for each in found)
        return Availability(ok=True, reason=f"{listed} in an environment of its own")

    def available(self, device: str, process: EngineProcess) -> Availability:
        """As `EngineSpec.available`: an address, an interpreter, or an environment for this device."""
        if process.url is not None:
            if settings.engine_token():
                return Availability(ok=True, reason=f"attached to {process.url}")
            hint = f"set {TOKEN_VARIABLE} to the token that the worker was started with"
            return Availability(ok=False, reason=f"{TOKEN_VARIABLE} is not set", hint=hint)
        if process.python is not None:
            return self._python_works(process.python)
        from torchspec.backends.remote.environments import find

        environment = find(self.name, device)
        if environment is None:
            reason = f"no environment of {self.name} for device {device} is installed"
            return Availability(ok=False, reason=reason, hint=self._hint(device))
        return Availability(ok=True, reason=f"{self.name} {environment.version} in {environment.path}")

    def load(self, options: EngineOptions) -> TargetEngine:
        """A worker with the target in it, captured from if `options.taps` says so."""
        from torchspec.core.workers.place import Attached
        from torchspec.core.workers.remote_engine import RemoteEngine
        from torchspec.core.workers.starting import attach

        process = options.process
        if process.url is not None:
            place = Attached(process.url, settings.engine_token(), name=self.name, patience=process.start_timeout)
            return RemoteEngine(self.name, options, place, lambda: None)
        if options.directory is not None and options.local_rank > 0:
            return attach(self.name, options)
        return self._started(options, None, 0)

    def serve(self, options: EngineOptions, draft: Path | None, draft_length: int) -> ServingEngine:
        """As `EngineSpec.serve`."""
        return self._started(options, draft, draft_length)

    def start(self, options: EngineOptions) -> StartedEngine:
        """As `EngineSpec.start`."""
        from torchspec.core.workers.starting import start

        return start(self._program(options), options)

    def attach(self, options: EngineOptions) -> StreamedEngine:
        """As `EngineSpec.attach`."""
        from torchspec.core.workers.starting import attach

        return attach(self.name, options)

    def _started(self, options: EngineOptions, draft: Path | None, draft_length: int) -> RemoteEngine:
        from torchspec.backends.remote.heads import is_head, target_with_head
        from torchspec.core.workers.starting import attach, start

        own = options.directory is None
        if own:
            directory = Path(tempfile.mkdtemp(prefix=f"torchspec-{self.name}-"))
            options = replace(options, directory=directory)
        with ExitStack() as undone:
            if draft is not None and is_head(draft):
                # Served from inside its target: the draft is then the target itself.
                place = undone.enter_context(tempfile.TemporaryDirectory(prefix=f"torchspec-{self.name}-target-"))
                draft = target_with_head(options.target, draft, Path(place) / "target")
                options = replace(options, target=draft)
            started = start(self._program(options), options, draft, draft_length)
            kept = undone.pop_all()

        def stop() -> None:
            started.close()
            kept.close()
            if own:
                shutil.rmtree(directory, ignore_errors=True)

        return attach(self.name, options, stop, draft)

    def attach_command(self, options: EngineOptions, port: int) -> str:
        """As `EngineSpec.command`: with a fresh token, which the training must be given too."""
        import shlex

        from torchspec.core.workers.starting import arguments

        program = self._program(options)
        words = [str(program.python), *arguments(self.runner, options), "--port", str(port)]
        token = secrets.token_urlsafe(24)
        path = shlex.quote(program.environment["PYTHONPATH"])
        return f"{TOKEN_VARIABLE}={token} PYTHONPATH={path} {shlex.join(words)}"

    def _program(self, options: EngineOptions) -> Program:
        """In the engine's environment, with torchspec's code beside it."""
        from torchspec.backends.remote.staging import stage
        from torchspec.core.workers.starting import Program

        python = options.process.python
        if python is None:
            from torchspec.backends.remote.environments import find

            environment = find(self.name, options.device.name)
            if environment is None:
                raise UnavailableError(
                    f"no environment of {self.name} for device {options.device.name} is installed\n    remedy: "
                    + self._hint(options.device.name)
                )
            python = environment.python
        staged = stage()
        folders = [staged / each for each in self.shims(options.device.name)]
        variables = settings.engine_environment(folders=[staged, *folders])
        return Program(name=self.name, runner=self.runner, python=python, environment=variables)

    def _python_works(self, python: Path) -> Availability:
        """Whether this interpreter finds the engine; it is not imported, which takes long."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
        try:
            done = subprocess.run(
                [str(python), "-P", "-c", code], capture_output=True, timeout=PROBE_SECONDS, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            hint = "give engine.python the interpreter of the engine's environment"
            return Availability(ok=False, reason=f"{python} cannot be run: {why}", hint=hint)
        if done.returncode:
            reason = f"{python} has no module {self.module}"
            return Availability(ok=False, reason=reason, hint=f"install it there, or {self._hint('cpu')}")
        return Availability(ok=True, reason=f"{self.name} in the environment of {python}")

    def _hint(self, device: str) -> str:
        return f"torchspec engine install {self.name} --device {device}"
