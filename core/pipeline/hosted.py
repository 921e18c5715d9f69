"""Workers around engines that run in the process that loads them: `python -m torchspec.core.workers THIS ...`."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torchspec.core import registry, settings
from torchspec.core.decoding.pushed import PushedDraft
from torchspec.core.interfaces.engine import DraftSource, EngineOptions, StartedEngine, StreamedEngine
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_processor import NO_PROCESSOR, takes_images
from torchspec.core.models.target_spec import read_target_spec, running_dtype
from torchspec.core.workers import starting
from torchspec.core.workers.hosted import HostedRunner
from torchspec.core.workers.runner import Facts, WorkerSettings

BACKEND = "backend"
"""The option that names the engine."""


def make_runner(wanted: WorkerSettings) -> HostedRunner:
    """The engine that the options name, with the target in it."""
    options: dict[str, Any] = dict(wanted.options)
    name = options.pop(BACKEND)
    device = registry.load_device(wanted.device)
    torch_device = device.runtime.bind(0)
    if wanted.memory_fraction is not None:
        device.runtime.limit_memory(wanted.memory_fraction)
    engine = registry.load_engine(
        name,
        EngineOptions(
            target=wanted.target,
            device=device,
            dtype=wanted.dtype,
            trust_remote_code=wanted.trust_remote_code,
            taps=wanted.taps,
        ),
    )
    spec = read_target_spec(wanted.target, wanted.trust_remote_code)
    facts = Facts(
        engine=name,
        engine_version=metadata.version("torchspec"),
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        itemsize=running_dtype(wanted.dtype, spec.dtype, torch_device).itemsize,
        context=spec.max_position_embeddings,
        vocab_size=spec.vocab_size,
        norm_state="post_norm",
        serial=True,
        no_images=_no_images(name, wanted.target),
    )

    def follow(source: DraftSource) -> PushedDraft:
        dtype = running_dtype(wanted.dtype, spec.dtype, torch_device)
        return PushedDraft(
            source.directory,
            spec,
            lambda: load_target_head(
                wanted.target, dtype=dtype, device=torch_device, trust_remote_code=wanted.trust_remote_code
            ),
            device,
            torch_device,
        )

    stepped = "decode" in registry.backends().spec(name).capabilities
    return HostedRunner(engine, wanted.taps, facts, follow if stepped else None)


def _no_images(backend: str, target: Path) -> str | None:
    if "images" not in registry.backends().spec(backend).capabilities:
        return "it has not the capability `images`"
    return None if takes_images(target) else NO_PROCESSOR


def start(backend: str, options: EngineOptions) -> StartedEngine:
    """A worker around this backend that ranks of this machine find in `options.directory`."""
    spec = registry.backends().spec(backend)
    if spec.start is not None:
        return spec.start(options)
    process = replace(options.process, options={**options.process.options, BACKEND: backend})
    return starting.start(_program(backend), replace(options, process=process))


def attach(backend: str, options: EngineOptions) -> StreamedEngine:
    """To a worker that `start` started, here or in another process."""
    spec = registry.backends().spec(backend)
    return spec.attach(options) if spec.attach is not None else starting.attach(backend, options)


def _program(backend: str) -> starting.Program:
    """This very interpreter, with what it sees."""
    return starting.Program(
        name=backend,
        runner=__name__,
        python=sys.executable,
        environment=settings.engine_environment(folders=[]),
    )
