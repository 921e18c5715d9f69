"""What an engine of a run is loaded with. Processes that only start engines read no more of the run than this."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.core import registry
from torchspec.core.algorithms.options import config_of
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


def engine_options(
    config: RunConfig, device: Device, directory: Path, local_rank: int = 0, *, images: bool = False
) -> EngineOptions:
    """An engine that captures what this run trains on. `images`: some of that has images."""
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
        images=images,
    )


def create_algorithm(config: RunConfig, target: TargetSpec) -> Algorithm:
    """See `algorithm_of`."""
    return algorithm_of(config.algorithm, config.draft, target)


def unserved(config: RunConfig, algorithm: Algorithm) -> str | None:
    """See `AlgorithmSpec.unserved`."""
    tell = registry.algorithms().spec(config.algorithm).unserved
    return None if tell is None else tell(algorithm)


def algorithm_of(name: str, draft: Any, target: TargetSpec) -> Algorithm:
    """Of a run's `draft` section. Raises ConfigError; what is wrong with a config.json that `draft.init_from` brought
    stands under that name."""
    try:
        made: Algorithm = registry.algorithms().spec(name).create(draft, target)
    except ConfigError as error:
        raise ConfigError([_as_given(problem, draft) for problem in error.problems]) from error
    return made


def _as_given(problem: Problem, draft: Any) -> Problem:
    start, file = getattr(draft, "init_from", None), getattr(draft, "config", None)
    if problem.field != "draft.config" or start is None or file != config_of(start):
        return problem
    value = str(start) if problem.value == str(file) else problem.value
    return replace(problem, field="draft.init_from", value=value)


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
