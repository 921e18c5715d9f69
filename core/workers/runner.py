"""What an engine must do inside the worker; the server around it is the same for all.

Every engine takes work while it works on other work: what is submitted together runs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import CaptureRequest, DraftSource, Images, ServedText, ServingCounters
from torchspec.core.interfaces.features import FeatureStore, NormState, RecordRef


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker is started with.

    taps            decoder layers whose outputs are captured; empty: this worker captures nothing
    draft           directory of an exported draft to decode with, and how many tokens it drafts a round
    store           directory in shared memory (`features.shared`) for the records of an engine that has processes of
                    its own
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

    `layers`, `hidden_size` and `itemsize` (bytes of a hidden value) are the target's, as the engine read it. `serial`:
    it works on one request at a time, and others wait for it. `no_images`: why it takes no images; None: it takes them.
    """

    engine: str
    engine_version: str
    layers: int
    hidden_size: int
    itemsize: int
    context: int
    vocab_size: int
    norm_state: NormState
    serial: bool = False
    no_images: str | None = "its worker was not made for them"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Text to write after `input_ids`: greedy at temperature 0; the first of `stop` ends it and is part of it.

    `images` stand in the ids, as in those of a `CaptureRequest`.

    `seed` is this text's own, `common_seed` that of all texts asked for together: `seed` was made from it and the ids.
    `source`: drafts to write with.
    """

    input_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    stop: Sequence[int]
    common_seed: int = 0
    source: DraftSource | None = None
    images: Images = ()


class Landing(FeatureStore, Protocol):
    """Where an engine puts its records, for the worker to find."""

    def find(self, record_id: str) -> RecordRef: ...


class Runner(Protocol):
    """An engine with its target loaded. Methods may be called from any thread and return at once.

    `landing`: where records appear; None: in `WorkerSettings.store`.
    """

    facts: Facts
    landing: Landing | None

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        """Each is done when its record is in the store; fails with an error whose text is for people."""
        ...

    def write(self, asks: Sequence[Ask]) -> list[Future[ServedText]]:
        """Of one request: they differ in their ids and seeds alone. TargetError when it cannot use their `source`."""
        ...

    def counters(self) -> ServingCounters: ...

    def close(self) -> None: ...


def refuse_images(facts: Facts, asked: Sequence[CaptureRequest] | Sequence[Ask]) -> None:
    """TargetError for images where the engine takes none."""
    if facts.no_images is not None and any(each.images for each in asked):
        raise TargetError(f"{facts.engine} takes no images of this target: {facts.no_images}")


def refuse_sources(engine: str, asks: Sequence[Ask]) -> None:
    """For runners whose engine takes no drafts while it runs."""
    if any(ask.source is not None for ask in asks):
        raise TargetError(f"{engine} takes no drafts while it runs, so it writes alone")
