"""A `TargetEngine` whose engine runs in a worker: the same for every engine there.

Nothing is lost when the engine dies: what it was asked for is asked for again of the next one, each sample for itself,
so that one that kills the engine takes no other with it. After three failures a sample is quarantined with the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from torchspec.core.errors import DataError, FeatureStoreError, LostOnTextError, StoreLostError, TargetError
from torchspec.core.interfaces.engine import (
    CaptureRequest,
    DecodeSession,
    DraftSource,
    EngineOptions,
    EngineUsage,
    Images,
    ServedText,
    ServingCounters,
    TargetSpec,
)
from torchspec.core.interfaces.features import (
    Captured,
    Features,
    FeatureSink,
    Quarantined,
    RecordRef,
)
from torchspec.core.models.images import ImageError, embedded
from torchspec.core.models.target_spec import read_target_spec, running_dtype
from torchspec.core.workers import protocol
from torchspec.core.workers.client import EngineLostError
from torchspec.core.workers.delivery import reconnect
from torchspec.core.workers.link import MOST_FAILURES, Link, Session
from torchspec.core.workers.place import Place
from torchspec.core.workers.server import HEADER_BYTES

log = logging.getLogger(__name__)

LAST_ATTEMPTS = ".last_attempts"
MOST_IMAGE_BYTES = protocol.MOST_BYTES // 2
"""Of a message; the rest is for its token ids."""

STORE_SECONDS = 1.0
"""Between two looks for a store that was lost."""


class RemoteEngine:
    """Implements `interfaces.engine.TargetEngine`. `stop` is called once, when it is closed."""

    def __init__(
        self, name: str, options: EngineOptions, place: Place, stop: Callable[[], None], *, draft: Path | None = None
    ) -> None:
        """Waits for the worker; TargetError when it is not there in time or is not one for this target."""
        self._name, self._options, self._place, self._stop = name, options, place, stop
        self._spec = read_target_spec(options.target, options.trust_remote_code)
        self._device = options.device.runtime.bind(options.local_rank)
        self._dtype = running_dtype(options.dtype, self._spec.dtype, self._device)
        self._numbers = itertools.count()
        self._prefix = hashlib.blake2b(f"{id(self)}{options.local_rank}".encode(), digest_size=4).hexdigest()
        self._last_attempts = threading.Lock()
        self._link = Link(name, options, place, self._spec, draft)
        self._closed = False
        try:
            self._link.connected()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The engine's."""
        return self._name

    @property
    def version(self) -> str:
        """The engine's."""
        return str(self._facts["engine_version"])

    @property
    def room(self) -> int:
        """Bytes of features that may wait to be taken."""
        return int(self._facts["store_bytes"])

    @property
    def serial(self) -> bool:
        """Whether it works on one request at a time."""
        return bool(self._facts["serial"])

    @property
    def _facts(self) -> dict[str, Any]:
        session = self._link.session
        assert session is not None
        return session.facts

    def describe(self) -> TargetSpec:
        return self._spec

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        """See `TargetEngine`; records come to the trainer's device on their way into the sink."""
        if tuple(taps) != tuple(self._options.taps):
            raise ValueError(f"this {self.name} was started for the taps {self._options.taps}, not {tuple(taps)}")
        for request in batch:
            self._check_tokens(request)
        found: dict[str, Captured] = {}
        batch, order = self._with_images(batch, found), [request.record_id for request in batch]
        failures: dict[str, int] = {request.record_id: 0 for request in batch}
        waiting = deque(self._waves(batch))
        patience: float | None = None
        while waiting:
            group = waiting.popleft()
            # What may have killed an engine twice meets none of the others of which that is so.
            last = any(failures[request.record_id] == MOST_FAILURES - 1 for request in group)
            try:
                with self._alone() if last else nullcontext():
                    failed, lost = self._capture_group(group, failures, sink, found)
            except StoreLostError as error:  # no sample's fault: once more when the store is there again
                patience = patience or time.monotonic() + self._options.process.start_timeout
                self._await_store(error, patience)
                waiting.appendleft([request for request in group if request.record_id not in found])
                continue
            again = []
            for request in group:
                if request.record_id not in failed:
                    continue
                failures[request.record_id] += 1
                if failures[request.record_id] < MOST_FAILURES:
                    again.append(request)
                else:
                    reason = f"failed {MOST_FAILURES} times, the last time: {failed[request.record_id]}"
                    found[request.record_id] = Quarantined(record_id=request.record_id, reason=reason)
            # The first time an engine is lost it need not be the samples' fault; and together they are captured as if
            # nothing had happened, down to the last bit.
            together = lost and all(failures[request.record_id] == 1 for request in again)
            waiting += [again] if together and again else [[request] for request in again]
        return [found[record_id] for record_id in order]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[Images] = (),
    ) -> list[list[int]]:
        """See `TextGenerator`. DataError for images that are not those that were tokenised."""
        texts = self._write(
            prompts, images=images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, source=None
        )
        return [list(text.tokens) for text in texts]

    def decode(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[ServedText]:
        """See `ServingEngine`."""
        return self.write(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        source: DraftSource | None = None,
    ) -> list[ServedText]:
        """See `StreamedEngine`. Asked again of the next engine when one dies; LostOnTextError the third time."""
        return self._write(
            prompts, images=(), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, source=source
        )

    def _write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        images: Sequence[Images],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        source: DraftSource | None,
    ) -> list[ServedText]:
        if not prompts:
            return []
        try:
            shown = [_sent(each) for each in images] or [{}] * len(prompts)
        except ImageError as error:
            raise DataError(str(error)) from error
        message: dict[str, Any] = {
            "prompts": [
                {"input_ids": list(ids), "seed": prompt_seed(seed, ids), **beside}
                for ids, beside in zip(prompts, shown, strict=True)
            ],
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop": list(self._spec.eos_token_ids),
        }
        if source is not None:
            message["source"] = {"directory": str(source.directory.resolve()), "length": source.length}
        for attempt in range(1, MOST_FAILURES + 1):
            try:
                _, answer = self._link.call(protocol.WRITE, message, f"text for {len(prompts)} prompts")
                return [_text(each) for each in answer["results"]]
            except EngineLostError as error:
                if attempt == MOST_FAILURES:
                    raise LostOnTextError(f"{self.name} failed {attempt} times on the same prompts: {error}") from error
        raise AssertionError

    def counters(self) -> ServingCounters:
        """Since the engine started, which may have been after it died."""
        try:
            _, answer = self._link.call(protocol.COUNTERS, {}, "its counters")
        except EngineLostError as error:
            raise TargetError(f"{self.name} died before it told its counters: measure again ({error})") from error
        positions = answer["per_position"]
        return ServingCounters(
            rounds=answer["rounds"],
            drafted=answer["drafted"],
            accepted=answer["accepted"],
            per_position=None if positions is None else tuple(positions),
        )

    def usage(self) -> EngineUsage:
        """See `StreamedEngine`."""
        try:
            told = self._link.connected().client.call(protocol.USAGE, {}, seconds=5.0, what="what it has done")
        except EngineLostError as error:  # captures will find out, too
            raise TargetError(str(error)) from error
        return EngineUsage(**{name: told[name] for name in EngineUsage.__dataclass_fields__})

    def open(
        self, prompts: Sequence[Sequence[int]], taps: Sequence[int], *, images: Sequence[Images] = ()
    ) -> DecodeSession:
        raise TargetError(f"{self.name} cannot be stepped token by token: only backends with `decode` can, such as hf")

    def close(self) -> None:
        """Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._link.close()
        self._stop()

    def _check_tokens(self, request: CaptureRequest) -> None:
        ids, vocabulary = request.input_ids, self._spec.vocab_size
        if not ids:
            raise ValueError(f"sample {request.record_id!r} has no tokens")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(
                f"sample {request.record_id!r} has token ids from {min(ids)} to {max(ids)}; the target at "
                f"{self._spec.path} knows 0 to {vocabulary - 1}: it was tokenised with another tokenizer"
            )

    def _waves(self, batch: Sequence[CaptureRequest]) -> Iterator[list[CaptureRequest]]:
        """Consecutive requests whose records fit into half of the store, so that others find room beside them, and
        whose images fit into a message."""
        session = self._link.connected()
        room = int(session.facts["store_bytes"]) // 2
        wave: list[CaptureRequest] = []
        for request in batch:
            longer = (*wave, request)
            too_much = sum(_nbytes(each, session) for each in longer) > room
            if wave and (too_much or sum(map(_image_bytes, longer)) > MOST_IMAGE_BYTES):
                yield wave
                wave = []
            wave.append(request)
        if wave:
            yield wave

    def _with_images(self, batch: Sequence[CaptureRequest], found: dict[str, Captured]) -> list[CaptureRequest]:
        """The requests with their images' bytes; those whose images cannot be sent are quarantined in `found`."""
        ready = []
        for request in batch:
            try:
                sent = replace(request, images=tuple(map(embedded, request.images)))
                if _image_bytes(sent) > MOST_IMAGE_BYTES:
                    raise ImageError(
                        f"its images take {_image_bytes(sent) / 1e6:.0f} MB of a message, which holds "
                        f"{MOST_IMAGE_BYTES / 1e6:.0f} MB of them"
                    )
                ready.append(sent)
            except ImageError as error:
                found[request.record_id] = Quarantined(record_id=request.record_id, reason=str(error))
        return ready

    def _capture_group(
        self,
        group: Sequence[CaptureRequest],
        failures: Mapping[str, int],
        sink: FeatureSink,
        found: dict[str, Captured],
    ) -> tuple[dict[str, str], bool]:
        """Put what could be captured into the sink and `found`; -> why the others could not; the engine was lost."""
        samples = [self._sample(request, failures[request.record_id]) for request in group]
        tokens = sum(len(request.input_ids) for request in group)
        try:
            what = f"the features of {len(group)} samples, {tokens} tokens"
            session, answer = self._link.call(protocol.CAPTURE, {"samples": samples}, what)
        except EngineLostError as error:
            return {request.record_id: str(error) for request in group}, True
        failed = {}
        for request, result in zip(group, answer["results"], strict=True):
            if "reason" in result:
                failed[request.record_id] = result["reason"]
                continue
            ref = RecordRef(record_id=result["id"], length=result["length"], checksum=result["checksum"])
            try:
                features = self._take(session, ref)
            except StoreLostError:
                raise
            except FeatureStoreError as error:
                failed[request.record_id] = str(error)
                continue
            wrong = self._misfit(request, features)
            if wrong:
                failed[request.record_id] = wrong
            else:
                found[request.record_id] = sink.put(request.record_id, features)
        return failed, self._link.session is not session  # what it had made went with it

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One last attempt at a time, of all threads and of all ranks of this machine."""
        directory = self._options.directory
        with self._last_attempts, ExitStack() as stack:
            if directory is not None and directory.is_dir():
                lock = stack.enter_context((directory / LAST_ATTEMPTS).open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _await_store(self, error: StoreLostError, until: float) -> None:
        """A little while; TargetError when it has been gone for too long."""
        if time.monotonic() > until:
            waited = f"waited {self._options.process.start_timeout:.0f} s for it (engine.start_timeout)"
            raise TargetError(f"{error}; {waited}") from error
        log.warning("%s: asking for what was in it again", error)
        time.sleep(STORE_SECONDS)
        session = self._link.session
        if session is not None and session.store is not None:
            with suppress(FeatureStoreError):
                reconnect(session.store)

    def _sample(self, request: CaptureRequest, attempt: int) -> dict[str, Any]:
        """As the protocol has it. Whoever takes a part of it must give the same name; no one else may."""
        sample: dict[str, Any] = {"input_ids": list(request.input_ids), **_sent(request.images)}
        if not request.parts:
            return {"id": f"{self._prefix}-{next(self._numbers)}", **sample}
        return {"id": f"{request.record_id}-{attempt}", **sample, "parts": request.parts, "part": request.part}

    def _take(self, session: Session, ref: RecordRef) -> Features:
        """To the trainer's device: a copy on a CPU too, so that the record's memory is free. Streamed ones stay."""
        store = session.store
        assert store is not None
        try:
            features = store.get(ref)
            if self._options.streamed and features.last_TH.device in (self._device, torch.device("cpu")):
                return features  # of an engine on another device they would fill that device
            return Features(
                input_ids_T=features.input_ids_T.clone(),
                taps_TNH=features.taps_TNH.to(self._device, copy=True),
                last_TH=features.last_TH.to(self._device, copy=True),
                tap_layers=features.tap_layers,
                norm_state=features.norm_state,
            )
        finally:
            with suppress(FeatureStoreError):
                store.remove(ref)

    def _misfit(self, request: CaptureRequest, features: Features) -> str:
        """What makes these features another sample's, or other ones than were asked for; "" if nothing does."""
        expected_T = torch.as_tensor(request.input_ids, dtype=torch.int64)
        if request.parts:
            expected_T = torch.cat([expected_T[start:stop] for start, stop in request.parts[request.part]])
        if not torch.equal(features.input_ids_T, expected_T):
            return f"{self.name} captured other tokens than it was given"
        if features.tap_layers != tuple(self._options.taps):
            return f"{self.name} captured the layers {features.tap_layers} instead of {tuple(self._options.taps)}"
        if features.last_TH.dtype != self._dtype:
            return f"{self.name} captured in {features.last_TH.dtype}, and the target runs in {self._dtype}"
        if features.last_TH.shape[1] != self._spec.hidden_size:
            return f"{self.name} captured states of size {features.last_TH.shape[1]}, not {self._spec.hidden_size}"
        return ""


def _nbytes(request: CaptureRequest, session: Session) -> int:
    return HEADER_BYTES + len(request.input_ids) * session.row_bytes


def _sent(images: Images) -> dict[str, Any]:
    """A sequence's images as the protocol has them: nothing where there are none."""
    return {"images": [asdict(embedded(image)) for image in images]} if images else {}


def _image_bytes(request: CaptureRequest) -> int:
    return sum(len(image.source) for image in request.images)


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """Of this prompt alone, so that its text is the same whatever else is asked for."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # some engines take 32 bits


def _text(result: dict[str, Any]) -> ServedText:
    accepted = result["accepted"]
    return ServedText(
        tokens=tuple(result["tokens"]),
        accepted=None if accepted is None else tuple(accepted),
        rounds=result["rounds"],
        accepted_tokens=result["accepted_tokens"],
    )
