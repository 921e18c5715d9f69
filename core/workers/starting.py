"""A worker's command line, and how it is started and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchspec.core import settings
from torchspec.core.errors import TargetError
from torchspec.core.features.shared import memory_directory
from torchspec.core.interfaces.engine import EngineOptions, EngineProcess
from torchspec.core.models.target_quantisation import described, read_quantisation
from torchspec.core.models.target_spec import read_target_spec, running_dtype
from torchspec.core.workers.place import Managed
from torchspec.core.workers.remote_engine import RemoteEngine
from torchspec.core.workers.supervisor import Launch, Supervisor

DEFAULT_STORE_MB = 2000


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a worker runs: `name` is the engine's, `runner` the module whose `make_runner` starts it."""

    name: str
    runner: str
    python: Path | str
    environment: Mapping[str, str]


def start(program: Program, options: EngineOptions, draft: Path | None = None, draft_length: int = 0) -> Supervisor:
    """A worker that is ready, found through `options.directory`.

    TargetError with the end of its log when it does not come up in time.
    """
    assert options.directory is not None
    environment = dict(program.environment)
    variable = options.device.runtime.visible_devices_variable
    if options.process.devices is not None and variable is not None:
        environment[variable] = settings.visible_devices(variable, options.process.devices)
    supervisor = Supervisor(
        Launch(
            name=program.name,
            command=[str(program.python), *arguments(program.runner, options, draft, draft_length)],
            environment=environment,
            directory=options.directory,
            start_timeout=options.process.start_timeout,
        )
    )
    try:
        supervisor.start()
    except TargetError as error:
        if (form := read_quantisation(options.target)) is None:
            raise
        raise TargetError(
            f"{error}\n    the target is quantised ({described(form)}): this engine may have no kernel for that on "
            f"{options.device.name}. `torchspec doctor --target {options.target}` says what else could run it"
        ) from error
    return supervisor


def attach(
    name: str, options: EngineOptions, stop: Callable[[], None] = lambda: None, draft: Path | None = None
) -> RemoteEngine:
    """To the worker in `options.directory`, which is waited for."""
    assert options.directory is not None
    managed = Managed(options.directory, name=name, patience=options.process.start_timeout)
    return RemoteEngine(name, options, managed, stop, draft=draft)


def arguments(runner: str, options: EngineOptions, draft: Path | None = None, draft_length: int = 0) -> list[str]:
    """Of the interpreter."""
    process = options.process
    words = ["-P", "-m", "torchspec.core.workers", runner]
    words += ["--target", str(options.target.resolve()), "--device", options.device.name]
    words += ["--dtype", engine_dtype(options), "--tensor-parallel", str(process.tensor_parallel)]
    words += ["--options", json.dumps(dict(process.options)), "--host", process.host]
    if options.taps:
        words += ["--taps", ",".join(map(str, options.taps)), "--store-mb", str(store_mb(process))]
        words += ["--delivery", json.dumps(dict(process.delivery))]
    if draft is not None:
        words += ["--draft", str(draft), "--draft-length", str(draft_length)]
    if process.memory_fraction is not None:
        words += ["--memory-fraction", str(process.memory_fraction)]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    return words


def engine_dtype(options: EngineOptions) -> str:
    """The precision that the target runs in, whatever engine runs it: engines read "auto" in ways of their own."""
    spec = read_target_spec(options.target, options.trust_remote_code)
    return str(running_dtype(options.dtype, spec.dtype, options.device.runtime.bind(options.local_rank))).removeprefix(
        "torch."
    )


def store_mb(process: EngineProcess) -> int:
    """What was asked for, or as much as shared memory can spare."""
    if process.store_mb is not None:
        return process.store_mb
    return max(1, min(DEFAULT_STORE_MB, int(0.8 * shutil.disk_usage(memory_directory()).free / 1e6)))
