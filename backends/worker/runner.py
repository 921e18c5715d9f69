"""What an engine must do inside the worker; the server around it is the same for all.

Every engine takes work while it works on other work: what is submitted together runs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torchspec.core.interfaces.engine import ServedText, ServingCounters
from torchspec.core.interfaces.features import NormState


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker is started with.

    taps            decoder layers whose outputs are captured; empty: this worker captures nothing
    draft           directory of an exported draft to decode with, and how many tokens it drafts a round
    store           directory of the feature store, as `features.shared` makes them
    store_bytes     what records that nobody has taken yet may hold
    memory_fraction of the device's memory that the engine may use; None: the engine's default
    options         handed to the engine's constructor as they are; they go before what torchspec would choose
    """

    target: Path
    device: str
    dtype: str
    taps: tuple[int, ...] = ()
    draft: Path | None = None
    draft_length: int = 0
    store: Path | None = None
    store_bytes: int = 1_000_000_000
    tensor_parallel: int = 1
    memory_fraction: float | None = None
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an engine is and will do. `norm_state`: of the last hidden states it captures; `taps` as in the settings.

    `layers`, `hidden_size` and `itemsize` (bytes of a hidden value) are the target's, as the engine read it.
    """

    engine: str
    engine_version: str
    layers: int
    hidden_size: int
    itemsize: int
    context: int
    vocab_size: int
    norm_state: NormState


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Text to write after `input_ids`: greedy at temperature 0; the first of `stop` ends it and is part of it."""

    input_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    stop: Sequence[int]


class Runner(Protocol):
    """An engine with its target loaded. Methods may be called from any thread and return at once."""

    facts: Facts

    def capture(self, record_id: str, input_ids: Sequence[int]) -> Future[None]:
        """Done when the record is in the store; fails with an error whose text is for people."""
        ...

    def write(self, ask: Ask) -> Future[ServedText]: ...

    def counters(self) -> ServingCounters: ...

    def close(self) -> None: ...
