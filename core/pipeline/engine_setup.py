"""What an engine of a run is loaded with. Processes that only start engines read no more of the run than this."""

from __future__ import annotations

from pathlib import Path

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.data.dataset import TokenDataset
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import EngineOptions, TargetSpec
from torchspec.core.models.target_spec import read_target_spec, resolve_target

ENGINE = "engine"
"""Folder of a run with its engines' logs, by machine."""


def engine_name(number: int) -> str:
    """The folder of one of them."""
    return f"engine-{number}"


def engine_options(config: RunConfig, device: Device, directory: Path, local_rank: int = 0) -> EngineOptions:
    """An engine that captures what this run trains on."""
    path = resolve_target(config.target.path)
    trusted = config.target.trust_remote_code
    return EngineOptions(
        target=path,
        device=device,
        local_rank=local_rank,
        dtype=config.target.dtype,
        trust_remote_code=trusted,
        taps=create_algorithm(config, read_target_spec(path, trusted)).taps,
        process=config.engine.process(),
        directory=directory,
    )


def create_algorithm(config: RunConfig, target: TargetSpec) -> Algorithm:
    return registry.algorithms().spec(config.algorithm).create(config.draft, target)


def check_images(config: RunConfig, data: TokenDataset) -> None:
    """ConfigError when samples have images and the engine that is to capture them takes none."""
    if data.with_images is None or "images" in registry.backends().spec(config.backend).capabilities:
        return
    raise ConfigError(
        [
            Problem(
                field="backend",
                value=config.backend,
                message=f"captures no images, which sample {data.with_images!r} has",
                remedy="name a backend with the capability `images`, such as hf, or leave such conversations out",
            )
        ]
    )
