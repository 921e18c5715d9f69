"""Where the target's engines run: in the trainer, beside it on the same devices, or elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torchspec.core import registry
from torchspec.core.config.schema import EngineConfig, RunConfig
from torchspec.core.interfaces.engine import EngineOptions, StartedEngine, StreamedEngine
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.pipeline import hosted
from torchspec.core.pipeline.engine_setup import engine_name
from torchspec.core.pipeline.topology_fit import choose_store, engine_fraction, engines_in_all
from torchspec.core.training.capturing import Model
from torchspec.core.training.feed import Feed
from torchspec.core.training.streaming import StreamingFeed
from torchspec.core.training.written import Writing

PREFETCH_MB = 500
ATTEMPTS = 3
"""Of a capture, before a sample is given up: see `core.workers.remote_engine`."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Engines in workers that this rank is attached to; `started` by it, if it is the one that starts them."""

    engines: Sequence[StreamedEngine]
    started: Sequence[StartedEngine]
    budget: int
    patience: float

    def feed(self, model: Model, context: ParallelContext, writing: Writing | None = None) -> Feed:
        """Collective: the ranks agree on a name for what they ask for. With `writing` the engines write the answers."""
        return StreamingFeed(
            model,
            context,
            self.engines,
            name=context.broadcast(secrets.token_hex(4)),
            budget=self.budget,
            patience=self.patience,
            writing=writing,
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
    store = choose_store(config, options.device, registry.backends().spec(config.backend))
    each = [
        replace(
            options,
            local_rank=0,
            streamed=True,
            directory=options.directory / engine_name(number),
            process=replace(
                options.process,
                devices=devices_of(number, size),
                delivery={"kind": store},
                memory_fraction=engine_fraction(config, options.device.runtime.device_type),
            ),
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
    mine = [replace(its, local_rank=context.local_rank) for its in each]
    return _attached(config, mine, started, context.local_world_size)


def disaggregated(config: RunConfig, options: EngineOptions, context: ParallelContext) -> Streaming:
    """All engines of the run, which its driver has placed."""
    assert options.directory is not None
    places = [options.directory / engine_name(number) for number in range(engines_in_all(config))]
    each = [replace(options, streamed=True, directory=place) for place in places]
    return _attached(config, each, [], context.world_size)


def _attached(
    config: RunConfig, each: Sequence[EngineOptions], started: Sequence[StartedEngine], ranks: int
) -> Streaming:
    """`ranks` ask these engines. What all of them may hold at a time fits into half of each engine's store: then no
    engine ever waits for room that a rank will only make when it has got what it waits for."""
    engines = [hosted.attach(config.backend, its) for its in each]
    most = min(engine.room for engine in engines) // (2 * ranks)
    return Streaming(
        engines=engines,
        started=started,
        budget=min((config.pipeline.prefetch_mb or PREFETCH_MB) * 1_000_000, most),
        patience=patience_of(config.engine),
    )


def patience_of(engine: EngineConfig) -> float:
    """Seconds after which every attempt has failed."""
    return ATTEMPTS * (engine.start_timeout + engine.call_timeout)


def engines_here(config: RunConfig, ranks: int) -> int:
    """On a machine with so many ranks: one for each `engine.tensor_parallel` of their devices, unless said."""
    return config.pipeline.engines or max(1, ranks // config.engine.tensor_parallel)


def devices_of(number: int, size: int) -> tuple[int, ...]:
    """The accelerators of the machine's engine of this number."""
    return tuple(range(number * size, (number + 1) * size))
