"""Where the target's engines run: in the trainer, beside it on the same devices, or elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import Problem
from torchspec.core.interfaces.engine import EngineOptions, EngineSpec, StartedEngine, TargetEngine
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.pipeline import hosted
from torchspec.core.pipeline.served_checks import given
from torchspec.core.training.capturing import Model
from torchspec.core.training.feed import Feed
from torchspec.core.training.streaming import StreamingFeed

PREFETCH_MB = 500
ATTEMPTS = 3
"""Of a capture, before a sample is given up: see `core.workers.remote_engine`."""

APPLIES = {
    "inprocess": frozenset({"topology"}),
    "colocated": frozenset({"topology", "engines", "prefetch_mb"}),
    "disaggregated": frozenset({"topology", "engines", "trainers", "prefetch_mb"}),
    "offline": frozenset({"topology", "features", "prefetch_mb"}),
}
"""Settings of the `pipeline` section that mean something, by topology."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Engines in workers that this rank is attached to; `started` by it, if it is the one that starts them."""

    engines: Sequence[TargetEngine]
    started: Sequence[StartedEngine]
    budget: int
    patience: float

    def feed(self, model: Model, context: ParallelContext) -> Feed:
        """Collective: the ranks agree on a name for what they ask for."""
        return StreamingFeed(
            model,
            context,
            self.engines,
            name=context.broadcast(secrets.token_hex(4)),
            budget=self.budget,
            patience=self.patience,
        )

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for started in self.started:
            started.close()


def colocated(config: RunConfig, options: EngineOptions, context: ParallelContext) -> Streaming:
    """The machine's engines, started by its first rank, and shared by all of its ranks."""
    assert options.directory is not None
    count = engines_here(config, context.local_world_size)
    size = options.process.tensor_parallel
    each = [
        replace(
            options,
            local_rank=0,
            streamed=True,
            directory=options.directory / engine_name(number),
            process=replace(options.process, devices=devices_of(number, size)),
        )
        for number in range(count)
    ]
    started: list[StartedEngine] = []
    if context.local_rank == 0:
        with ThreadPoolExecutor(count) as pool:  # an engine takes its time to start: all of them at once
            waiting = [pool.submit(hosted.start, config.backend, its) for its in each]
        failed = [error for future in waiting if (error := future.exception()) is not None]
        started = [future.result() for future in waiting if future.exception() is None]
        if failed:
            for engine in started:
                engine.close()
            raise failed[0]
    return _attached(config, [replace(its, local_rank=context.local_rank) for its in each], started)


def disaggregated(config: RunConfig, options: EngineOptions) -> Streaming:
    """All engines of the run, which its driver has placed."""
    assert options.directory is not None
    names = [engine_name(number) for number in range(engines_in_all(config))]
    return _attached(
        config, [replace(options, streamed=True, directory=options.directory / name) for name in names], []
    )


def _attached(config: RunConfig, each: Sequence[EngineOptions], started: Sequence[StartedEngine]) -> Streaming:
    process = config.engine
    return Streaming(
        engines=[hosted.attach(config.backend, its) for its in each],
        started=started,
        budget=(config.pipeline.prefetch_mb or PREFETCH_MB) * 1_000_000,
        patience=ATTEMPTS * (process.start_timeout + process.call_timeout),
    )


def engine_name(number: int) -> str:
    return f"engine-{number}"


def engines_in_all(config: RunConfig) -> int:
    """Of a disaggregated run."""
    return config.pipeline.engines or 1


def trainers_in_all(config: RunConfig) -> int:
    """Of a disaggregated run."""
    return config.pipeline.trainers or 1


def engines_here(config: RunConfig, ranks: int) -> int:
    """On a machine with so many ranks: one for each `engine.tensor_parallel` of their devices, unless said."""
    return config.pipeline.engines or max(1, ranks // config.engine.tensor_parallel)


def devices_of(number: int, size: int) -> tuple[int, ...]:
    """The accelerators of the machine's engine of this number."""
    return tuple(range(number * size, (number + 1) * size))


def topology_problems(config: RunConfig, backend: EngineSpec | None) -> list[Problem]:
    """Settings that the topology would ignore, each by its name, and those that it cannot do with."""
    pipeline = config.pipeline
    found = [
        Problem(
            field=f"pipeline.{name}",
            message=f"means nothing with pipeline.topology={pipeline.topology}",
            remedy="leave it out, or name another topology",
        )
        for name in sorted(pipeline.model_fields_set - APPLIES[pipeline.topology])
        if getattr(pipeline, name) is not None
    ]
    if pipeline.topology != "disaggregated":
        message, remedy = "is for pipeline.topology=disaggregated", "leave it out"
        found += [Problem(field=f"ray.{name}", message=message, remedy=remedy) for name in given(config.ray)]
    if pipeline.topology == "inprocess":
        return found
    if pipeline.topology == "offline":
        return [*found, *_offline_problems(config)]
    if config.target.tensor_parallel > 1:
        message = f"the target is in engines of their own with pipeline.topology={pipeline.topology}"
        remedy = "give engine.tensor_parallel instead"
        value = config.target.tensor_parallel
        found.append(Problem(field="target.tensor_parallel", value=value, message=message, remedy=remedy))
    if config.engine.url is not None:
        message = "is for pipeline.topology=inprocess: other topologies start their engines themselves"
        found.append(Problem(field="engine.url", value=config.engine.url, message=message, remedy="leave it out"))
    return found


def _offline_problems(config: RunConfig) -> list[Problem]:
    """No engine is loaded, so nothing may be said of one."""
    message, remedy = "no engine is loaded with pipeline.topology=offline", "leave it out"
    found = [Problem(field=f"engine.{name}", message=message, remedy=remedy) for name in given(config.engine)]
    if config.target.tensor_parallel > 1:
        value = config.target.tensor_parallel
        found.append(Problem(field="target.tensor_parallel", value=value, message=message, remedy=remedy))
    if config.pipeline.features is None:
        message, remedy = "a directory of captured features is needed", "make one with `torchspec capture`"
        found.append(Problem(field="pipeline.features", message=message, remedy=remedy))
    return found
