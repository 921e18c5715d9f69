"""What runs in the cluster's actors: an engine's supervisor, or the process of a rank. Ray places and watches them.

An actor that dies takes its process with it: a worker ends with its standard input, a rank with its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from torchspec.core import registry, settings
from torchspec.core.config.schema import RunConfig, run_schema, stated
from torchspec.core.interfaces.engine import StartedEngine
from torchspec.core.pipeline import hosted
from torchspec.core.pipeline.engine_setup import ENGINE, engine_name, engine_options
from torchspec.core.pipeline.exporter import Exporter

TAIL_BYTES = 4000


class EngineAgent:
    """Starts an engine's worker and keeps it; its state file in the run directory is where ranks find it."""

    def __init__(
        self,
        config: dict[str, Any],
        device: str,
        number: int,
        host: str,
        delivery: dict[str, Any],
        environment: dict[str, str],
    ) -> None:
        """Returns at once: `state` says how far it is. `host`: the address to listen on, "" for the machine's own."""
        settings.take_on(environment)
        self._config, self._device, self._number = read_config(config), device, number
        self._host, self._delivery = host, delivery
        self._engine: StartedEngine | None = None
        self._error = ""
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        config = self._config
        directory = config.output / ENGINE / engine_name(self._number)
        try:
            options = engine_options(config, registry.load_device(self._device), directory)
            process = replace(options.process, host=self._host or own_address(), delivery=self._delivery)
            self._engine = hosted.start(config.backend, replace(options, process=process))
        except Exception as error:  # whatever it is, the driver must hear of it  # noqa: BLE001
            self._error = str(error) or type(error).__name__

    def state(self) -> tuple[str, str]:
        """(starting, ready or failed; why it failed)."""
        if self._error:
            return "failed", self._error
        return ("ready" if self._engine is not None else "starting"), ""

    def close(self) -> None:
        self._thread.join(timeout=1.0)
        if self._engine is not None:
            self._engine.close()


class RankAgent:
    """Runs one rank's process, with what it says in a file of the run directory."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._exporter: Exporter | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str], place: Mapping[str, Any], log: str) -> int:
        """-> its process number. `place`: arguments of `settings.rank_environment`."""
        self._log = Path(log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # Ray shows each rank its own accelerator alone
        output: IO[bytes]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                env={**settings.rank_environment(**place), **alone, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._process.pid

    def export(self, metrics: str, run: str) -> None:
        """The run's figures through Ray's own exporter, as long as this actor lives."""
        self._exporter = Exporter(Path(metrics), run)

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def send(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def tail(self) -> str:
        """What it said last."""
        if self._log is None:
            return ""
        data = self._log.read_bytes()[-TAIL_BYTES:]
        return data.decode(errors="replace").rstrip()


def own_address() -> str:
    """Of this machine, as the cluster knows it."""
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def read_config(values: dict[str, Any]) -> RunConfig:
    """Of a checked configuration's JSON."""
    options = registry.algorithms().spec(values["algorithm"]).options
    return run_schema(options).model_validate({**values, "draft": stated(options, values["draft"])})
