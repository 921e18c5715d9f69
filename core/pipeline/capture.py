"""`torchspec capture`: the features of every sample into a directory, once, for any number of trainings on them.

One engine makes them in the groups, and so in the shapes, in which the first epoch of a training would. A record gets
its name when it is whole, so a capture that was stopped at any moment goes on with what is there.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset
from torchspec.core.errors import FeatureStoreError, TargetError
from torchspec.core.features.directory import DirectoryStore
from torchspec.core.features.manifest import MANIFEST, Lost, Manifest, record_name
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.interfaces.engine import CaptureRequest, TargetEngine
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.models.target_spec import running_dtype
from torchspec.core.pipeline.assembly import ProgressSink
from torchspec.core.pipeline.capture_config import captured_config, sequence_ranks
from torchspec.core.pipeline.capture_directory import Kept, claim, kept_records, opened, to_disk
from torchspec.core.pipeline.capture_groups import cut_of, groups_facts, groups_of
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.engine_setup import ENGINE, check_images, engine_options
from torchspec.core.pipeline.offline import features_identity
from torchspec.core.pipeline.preflight import Checked, check
from torchspec.core.pipeline.run_dir import versions
from torchspec.core.training.checkpoint_files import sync_directory
from torchspec.core.training.signals import StopRequest
from torchspec.core.training.trainer import LEAST_QUARANTINED

logger = logging.getLogger(__name__)

STAGE = "capture"
"""Its progress is in tokens."""
GROUPS_AHEAD = 2
"""That may wait to be written while the next one is captured."""
ROW_BYTES, RECORD_BYTES = 16, 700
"""Of a record beside the hidden states: each token's id and its row's sum; header and metadata."""


@dataclass(frozen=True, kw_only=True)
class CaptureOutcome:
    """What a capture came to: samples = captured + quarantined when it has finished. `kept` of the captured ones were
    there before. `signal` is 0 unless it was stopped by one."""

    directory: Path
    samples: int
    captured: int
    kept: int
    quarantined: int
    nbytes: int
    signal: int

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0


def capture(config: RunConfig, *, progress: ProgressSink | None = None) -> CaptureOutcome:
    """Write the features of every sample of `config.data.train` to `config.output`, or go on with that.

    The configuration is a training's; what a capture has no use for is passed over. One process, one engine. SIGINT or
    SIGTERM finishes the group that is captured and returns; the same call goes on. Raises TorchspecError for everything
    a user can act on: a directory of other features, with every difference; a full disk, which loses nothing.
    """
    checked = check(captured_config(config), Ranks(), trains=False)
    device = registry.load_device(checked.device.name)
    torch_device = device.runtime.bind(0)
    settings = DatasetSettings.from_config(checked.config.data)
    assert checked.tokenizer is not None
    data = load_dataset(checked.config.data.train, checked.tokenizer, settings, progress)
    check_images(checked.config, data)
    identity = features_identity(
        checked.config, checked.algorithm, checked.target, checked.tokenizer, torch_device, data.ingredients
    )
    cut = cut_of(checked)
    groups = groups_facts(checked, cut, sequence_ranks(config))
    with opened(checked.config.output) as store:
        claim(store.root, identity, groups, {"versions": versions()})
        kept = kept_records(store, data, progress)
        if len(kept) == len(data) and (store.root / MANIFEST).is_file():
            logger.info("every sample of the data is captured in %s", store.root)
            return _outcome(store, len(data), kept, kept, {}, 0)
        (store.root / MANIFEST).unlink(missing_ok=True)
        if len(kept) < len(data):
            _check_room(checked, store.root, data, kept, torch_device)
        session = _Session(checked, store, data, kept)
        wanted = [] if len(kept) == len(data) else groups_of(checked, cut, sequence_ranks(config), data)
        if wanted:
            shutil.rmtree(store.root / ENGINE, ignore_errors=True)
            if progress is not None:
                progress("load target", 0, 1)
            engine = registry.load_engine(
                checked.config.backend,
                engine_options(checked.config, device, store.root / ENGINE, images=data.with_images is not None),
            )
            if progress is not None:
                progress("load target", 1, 1)
            try:
                received = session.run(engine, wanted, progress)
            finally:
                engine.close()
            if received and not session.complete:
                return _outcome(store, len(data), session.there, kept, session.lost, received)
        _finish(checked, store, data, session, identity, {**groups, "versions": versions()})
        return _outcome(store, len(data), session.there, kept, session.lost, 0)


class _Session:
    """Captures what is missing, and knows what is `there` and what is `lost`, by the sample's place.

    `there` is the writing thread's while `run` runs; each sample is in one group.
    """

    def __init__(self, checked: Checked, store: DirectoryStore, data: TokenDataset, kept: Mapping[int, Kept]) -> None:
        self._taps = checked.algorithm.taps
        self._store, self._data = store, data
        self.there: dict[int, Kept] = dict(kept)
        self.lost: dict[int, Lost] = {}
        self._norm_state = next((each.norm_state for each in kept.values()), None)
        self._tokens = sum(data.lengths[index] for index in kept)

    @property
    def complete(self) -> bool:
        return len(self.there) + len(self.lost) == len(self._data)

    def run(self, engine: TargetEngine, groups: Sequence[Sequence[int]], progress: ProgressSink | None) -> int:
        """-> the signal that arrived, or 0. What was captured is written, whatever ends it."""
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer, StopRequest() as stop:
                self._run(engine, groups, writer, stop, progress)
                return stop.received
        except FeatureStoreError as error:
            raise FeatureStoreError(
                f"{error}\n{len(self.there)} of {len(self._data)} samples are captured and stay: when there is room, "
                "the same command goes on with the others"
            ) from error

    def _run(
        self,
        engine: TargetEngine,
        groups: Sequence[Sequence[int]],
        writer: ThreadPoolExecutor,
        stop: StopRequest,
        progress: ProgressSink | None,
    ) -> None:
        waiting: deque[Future[int]] = deque()

        def written(most: int) -> None:
            """Until no more than `most` groups wait to be written."""
            while len(waiting) > most:
                self._tokens += waiting.popleft().result()
            if progress is not None:
                progress(STAGE, self._tokens, sum(self._data.lengths))

        written(0)
        for group in groups:
            if stop.received:
                break
            if all(index in self.there for index in group):
                continue
            captured = self._capture(engine, group)
            waiting.append(writer.submit(self._write, captured))
            written(GROUPS_AHEAD)
        written(0)

    def _capture(self, engine: TargetEngine, group: Sequence[int]) -> dict[int, Features]:
        """The missing ones of the group. All of it is run: in another shape sums are rounded otherwise."""
        requests = [
            CaptureRequest(record_id=record_name(index), input_ids=sample.input_ids_T.tolist(), images=sample.images)
            for index, sample in ((index, self._data[index]) for index in group)
        ]
        memory = MemoryStore()
        with torch.no_grad():
            found = engine.capture(requests, self._taps, memory)
        captured = {}
        for index, each in zip(group, found, strict=True):
            if index in self.there:
                continue
            if isinstance(each, Quarantined):
                self._lose(index, each.reason)
            else:
                captured[index] = take(memory, each)
        return captured

    def _write(self, captured: Mapping[int, Features]) -> int:
        """-> tokens."""
        for index, features in captured.items():
            self._norm_state = self._norm_state or features.norm_state
            if features.norm_state != self._norm_state:
                raise FeatureStoreError(
                    f"norm_state: the features in {self._store.root} have {self._norm_state!r}, this engine makes "
                    f"{features.norm_state!r}: capture into another directory"
                )
            checksum = self._store.put(record_name(index), features).checksum
            to_disk(self._store.root, index)
            self.there[index] = Kept(checksum=checksum, norm_state=features.norm_state)
        return sum(len(features.input_ids_T) for features in captured.values())

    def _lose(self, index: int, reason: str) -> None:
        sample = self._data[index]
        logger.warning("sample %s could not be captured: %s", sample.sample_id, reason)
        self.lost[index] = Lost(sample_id=sample.sample_id, reason=reason)
        self._tokens += sample.input_ids_T.numel()
        if len(self.lost) >= LEAST_QUARANTINED and len(self.lost) > len(self.there):
            raise TargetError(
                f"{len(self.lost)} samples could not be captured so far and {len(self.there)} could, so something is "
                f"wrong with the engine or the target rather than with samples. The last reason: {reason}"
            )


def _check_room(
    checked: Checked, directory: Path, data: TokenDataset, kept: Mapping[int, Kept], device: torch.device
) -> None:
    """Say what is to come; FeatureStoreError where the disk has no room for it."""
    dtype = running_dtype(checked.config.target.dtype, checked.target.dtype, device)
    row = (len(checked.algorithm.taps) + 1) * checked.target.hidden_size * dtype.itemsize + ROW_BYTES
    missing = [length for index, length in enumerate(data.lengths) if index not in kept]
    expected, free = sum(missing) * row + len(missing) * RECORD_BYTES, shutil.disk_usage(directory).free
    logger.info(
        "%d of %d samples to capture, %d tokens: %.3f GB of features expected, %.1f GB are free for %s",
        len(missing), len(data), sum(missing), expected / 1e9, free / 1e9, directory,
    )  # fmt: skip
    if expected > free:
        raise FeatureStoreError(
            f"{len(missing)} samples of {sum(missing)} tokens make {expected / 1e9:.3f} GB of features, and the disk "
            f"of {directory} has {free / 1e9:.3f} GB: name an output with more room, or capture less data"
        )


def _finish(
    checked: Checked,
    store: DirectoryStore,
    data: TokenDataset,
    session: _Session,
    identity: dict[str, Any],
    circumstances: dict[str, Any],
) -> None:
    """The manifest, when all records have reached the disk."""
    there = session.there
    if not there:
        reasons = "; ".join(sorted({lost.reason for lost in session.lost.values()}))
        raise TargetError(f"not one of the {len(data)} samples could be captured: {reasons}")
    sync_directory(store.root)
    checksums = tuple(there[index].checksum if index in there else None for index in range(len(data)))
    manifest = Manifest(
        identity=identity,
        circumstances=circumstances,
        rows=data.report.to_json(tuple(checked.reader.files)),
        norm_state=next(iter(there.values())).norm_state,
        nbytes=store.usage().nbytes,
        checksums=checksums,
        lost=dict(sorted(session.lost.items())),
    )
    try:
        manifest.save(store.root)
    except OSError as error:
        raise FeatureStoreError(
            f"{store.root / MANIFEST} cannot be written ({error.strerror}); all records are there: make room, and the "
            "same command finishes"
        ) from error


def _outcome(
    store: DirectoryStore,
    samples: int,
    there: Mapping[int, Kept],
    kept: Mapping[int, Kept],
    lost: Mapping[int, Lost],
    signal: int,
) -> CaptureOutcome:
    return CaptureOutcome(
        directory=store.root,
        samples=samples,
        captured=len(there),
        kept=len(kept),
        quarantined=len(lost),
        nbytes=store.usage().nbytes,
        signal=signal,
    )
