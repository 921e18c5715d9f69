"""Engine and trainer on one device at the same time, where the device has a service for it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError, Problem, UnavailableError
from torchspec.core.interfaces.device import Device, Multiplexer

logger = logging.getLogger(__name__)

FIELD = "pipeline.multiplex"


def multiplexer_of(config: RunConfig, device: Device) -> Multiplexer | None:
    """The service that the run is to have; None where there is none, or none is wanted.

    ConfigError where it is asked for and not there."""
    wanted = config.pipeline.multiplex
    if config.pipeline.topology != "colocated" or wanted == "off":
        return None
    found = device.multiplexer
    why = f"device {device.name} has no such service" if found is None else found.available().reason
    if not why:
        return found
    if wanted == "on":
        raise ConfigError([Problem(field=FIELD, value=wanted, message=why, remedy="leave it at auto")])
    return None


@contextmanager
def multiplexed(config: RunConfig, device: str) -> Iterator[Mapping[str, str]]:
    """The service for as long as the block runs -> variables for the run's processes, which must be started in it.

    ConfigError where it was asked for and does not start; without being asked for the run goes on without it."""
    multiplexer = multiplexer_of(config, registry.load_device(device))
    if multiplexer is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="torchspec-", ignore_cleanup_errors=True) as text:
        directory = Path(text)
        try:
            stop = multiplexer.start(directory)
        except UnavailableError as error:
            if config.pipeline.multiplex == "on":
                raise ConfigError([Problem(field=FIELD, value="on", message=str(error))]) from error
            logger.warning("engine and trainer take turns on their device: %s", error)
            yield {}
            return
        try:
            yield multiplexer.environment(directory)
        finally:
            stop()
