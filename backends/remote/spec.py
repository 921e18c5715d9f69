"""The registry's description of an engine that runs in a worker: how it is found, started and asked."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torchspec.backends.api import (
    Availability,
    EngineOptions,
    EngineProcess,
    EngineSpec,
    ServingEngine,
    TargetEngine,
    UnavailableError,
)
from torchspec.backends.worker.protocol import TOKEN_VARIABLE
from torchspec.core import settings

if TYPE_CHECKING:
    from torchspec.backends.remote.engine import RemoteEngine

log = logging.getLogger(__name__)

PROBE_SECONDS = 60
DEFAULT_STORE_MB = 2000


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`module` is what must be importable in the engine's environment, `runner` the module whose `make_runner` starts
    the engine there. `shims(device)`: folders under the staged code that go onto the engine's path on this device."""

    name: str
    module: str
    runner: str
    shims: Callable[[str], tuple[str, ...]] = field(default=lambda device: ())

    def spec(self) -> EngineSpec:
        return EngineSpec(
            name=self.name,
            probe=self.probe,
            load=self.load,
            capabilities=frozenset({"capture", "generate", "serve"}),
            available=self.available,
            command=self.attach_command,
            serve=self.serve,
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
        from torchspec.backends.remote.engine import RemoteEngine
        from torchspec.backends.remote.place import Attached, Managed

        process = options.process
        if process.url is not None:
            place = Attached(process.url, settings.engine_token(), name=self.name, patience=process.start_timeout)
            return RemoteEngine(self.name, options, place, lambda: None)
        if options.directory is not None and options.local_rank > 0:
            managed = Managed(options.directory, name=self.name, patience=process.start_timeout)
            return RemoteEngine(self.name, options, managed, lambda: None)
        return self._start(options, None, 0)

    def serve(self, options: EngineOptions, draft: Path | None, draft_length: int) -> ServingEngine:
        """As `EngineSpec.serve`."""
        return self._start(options, draft, draft_length)

    def _start(self, options: EngineOptions, draft: Path | None, draft_length: int) -> RemoteEngine:
        from torchspec.backends.remote.engine import RemoteEngine
        from torchspec.backends.remote.place import Managed
        from torchspec.backends.remote.supervisor import Launch, Supervisor

        own = options.directory is None
        directory = Path(tempfile.mkdtemp(prefix=f"torchspec-{self.name}-")) if own else options.directory
        assert directory is not None
        python, environment = self._place(options)
        launch = Launch(
            name=self.name,
            command=[str(python), *self.arguments(options, draft, draft_length)],
            environment=environment,
            directory=directory,
            start_timeout=options.process.start_timeout,
        )
        supervisor = Supervisor(launch)

        def stop() -> None:
            supervisor.close()
            if own:
                shutil.rmtree(directory, ignore_errors=True)

        supervisor.start()
        managed = Managed(directory, name=self.name, patience=options.process.start_timeout)
        return RemoteEngine(self.name, options, managed, stop, draft=draft)

    def arguments(self, options: EngineOptions, draft: Path | None, draft_length: int) -> list[str]:
        """Of the interpreter."""
        process = options.process
        words = ["-P", "-m", "torchspec.backends.worker", self.runner]
        words += ["--target", str(options.target.resolve()), "--device", options.device.name]
        words += ["--dtype", engine_dtype(options), "--tensor-parallel", str(process.tensor_parallel)]
        words += ["--options", json.dumps(dict(process.options))]
        if options.taps:
            words += ["--taps", ",".join(map(str, options.taps)), "--store-mb", str(store_mb(process))]
        if draft is not None:
            words += ["--draft", str(draft), "--draft-length", str(draft_length)]
        if process.memory_fraction is not None:
            words += ["--memory-fraction", str(process.memory_fraction)]
        if options.trust_remote_code:
            words.append("--trust-remote-code")
        return words

    def attach_command(self, options: EngineOptions, port: int) -> str:
        """As `EngineSpec.command`: with a fresh token, which the training must be given too."""
        import shlex

        python, environment = self._place(options)
        words = [str(python), *self.arguments(options, None, 0), "--port", str(port)]
        token = secrets.token_urlsafe(24)
        path = shlex.quote(environment["PYTHONPATH"])
        return f"{TOKEN_VARIABLE}={token} PYTHONPATH={path} {shlex.join(words)}"

    def _place(self, options: EngineOptions) -> tuple[Path, dict[str, str]]:
        """The engine's interpreter and its environment variables."""
        from torchspec.backends.remote.staging import stage

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
        return python, settings.engine_environment(folders=[staged, *folders])

    def _python_works(self, python: Path) -> Availability:
        """Whether this interpreter finds the engine; it is not imported, which takes long."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
        try:
            done = subprocess.run(
                [str(python), "-P", "-c", code], capture_output=True, timeout=PROBE_SECONDS, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            return Availability(ok=False, reason=f"{python} cannot be run: {error}", hint="name a Python interpreter")
        if done.returncode:
            reason = f"{python} has no module {self.module}"
            return Availability(ok=False, reason=reason, hint=f"install it there, or {self._hint('cpu')}")
        return Availability(ok=True, reason=f"{self.name} in the environment of {python}")

    def _hint(self, device: str) -> str:
        return f"torchspec engine install {self.name} --device {device}"


def engine_dtype(options: EngineOptions) -> str:
    """The precision that the target runs in, whatever engine runs it: engines read "auto" in ways of their own."""
    from torchspec.core.models.target_spec import read_target_spec, running_dtype

    spec = read_target_spec(options.target, options.trust_remote_code)
    return str(running_dtype(options.dtype, spec.dtype, options.device.runtime.bind(options.local_rank))).removeprefix(
        "torch."
    )


def store_mb(process: EngineProcess) -> int:
    """What was asked for, or as much as shared memory can spare."""
    from torchspec.core.features.shared import memory_directory

    if process.store_mb is not None:
        return process.store_mb
    return max(1, min(DEFAULT_STORE_MB, int(0.8 * shutil.disk_usage(memory_directory()).free / 1e6)))
