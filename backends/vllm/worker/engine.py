"""vLLM's engine on a thread of its own: requests go in as they come, and run together.

The synchronous engine is stepped here, instead of vLLM's asynchronous one, since it can live in this very process:
starting it takes a third of the time.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torchspec.backends.vllm.worker.arguments import engine_arguments, environment
from torchspec.backends.vllm.worker.images import ids_of, prompt_with_images
from torchspec.core.errors import (
    FeatureStoreError,
    MissingRecordError,
    TargetError,
    TorchspecError,
    UnavailableError,
)
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.engine import CaptureRequest, Images, ServedText, ServingCounters
from torchspec.core.models.images import ImageError
from torchspec.core.settings import set_defaults
from torchspec.core.workers.image_proof import images_refused
from torchspec.core.workers.reports import failure_of
from torchspec.core.workers.runner import Ask, Facts, Landing, WorkerSettings, refuse_images, refuse_sources

log = logging.getLogger(__name__)

TESTED = ("0.32.0",)
NEEDED = ("_submit_async_write", "request_finished", "get_finished", "wait_for_save", "build_connector_meta")
"""Of vLLM's example connector, what ours stands on."""

RECORD_SECONDS = 60.0
"""From the end of a request to its record, of which nothing but writing is left to do."""

PROOF, PROOF_SECONDS = "proof", 120.0
IDLE_SECONDS = 0.5
POLL_SECONDS = 0.01


@dataclass(kw_only=True)
class _Capture:
    future: Future[None]
    length: int
    finished_at: float | None = None


@dataclass(kw_only=True)
class _Writing:
    future: Future[ServedText]


class VllmRunner:
    """See `core.workers.runner.Runner`."""

    landing: Landing | None = None
    facts: Facts

    def __init__(self, settings: WorkerSettings) -> None:
        """Load the target; raises UnavailableError where this vLLM is not one we can work with."""
        set_defaults(environment(settings))
        check_version()
        self._settings = settings
        self._store = None if settings.store is None else SharedMemoryStore(root=settings.store)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._captures: dict[str, _Capture] = {}
        self._writings: dict[str, _Writing] = {}
        self._count = 0
        ready: Future[None] = Future()
        # Built where it is stepped: vLLM binds threads of the CPU to the thread that builds it.
        self._thread = threading.Thread(target=self._work, args=(ready,), name="vllm", daemon=True)
        self._thread.start()
        ready.result()
        if settings.taps:
            self._prove_capture()
        ids = partial(ids_of, self._engine)
        self.facts = replace(self.facts, no_images=images_refused(self, settings, ids, PROOF_SECONDS))

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        refuse_images(self.facts, samples)
        return [self._capture(each.record_id, each.input_ids, each.images) for each in samples]

    def _capture(self, record_id: str, input_ids: Sequence[int], images: Images = ()) -> Future[None]:
        future: Future[None] = Future()

        def begin() -> None:
            from vllm import SamplingParams

            from torchspec.backends.vllm.worker.connector import RECORD

            self._captures[record_id] = _Capture(future=future, length=len(input_ids))
            params = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": {RECORD: record_id}},
            )
            self._add(record_id, input_ids, images, params)

        return self._submit(begin, future)

    def write(self, asks: Sequence[Ask]) -> list[Future[ServedText]]:
        refuse_images(self.facts, asks)
        refuse_sources(self.facts.engine, asks)
        return [self._write(ask) for ask in asks]

    def _write(self, ask: Ask) -> Future[ServedText]:
        future: Future[ServedText] = Future()

        def begin() -> None:
            from vllm import SamplingParams

            self._count += 1
            name = f"write-{self._count}"
            self._writings[name] = _Writing(future=future)
            params = SamplingParams(
                max_tokens=ask.max_new_tokens,
                temperature=ask.temperature,
                seed=None if ask.temperature == 0 else ask.seed,
                ignore_eos=True,
                stop_token_ids=list(ask.stop),
                detokenize=False,
            )
            self._add(name, ask.input_ids, ask.images, params)

        return self._submit(begin, future)

    def counters(self) -> ServingCounters:
        """vLLM's `spec_decode_*` counters. Its per-position counter says how many rounds accepted that position."""
        values: dict[str, Any] = {metric.name: metric for metric in self._engine.get_metrics()}
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        rounds, drafted, accepted = (int(getattr(values.get(f"vllm:spec_decode_{n}"), "value", 0)) for n in names)
        per_position = values.get("vllm:spec_decode_num_accepted_tokens_per_pos")
        return ServingCounters(
            rounds=rounds,
            drafted=drafted,
            accepted=accepted,
            per_position=None if per_position is None else tuple(int(value) for value in per_position.values),
        )

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _submit(self, begin: Callable[[], None], future: Future[Any]) -> Future[Any]:
        def guarded() -> None:
            try:
                begin()
            except (ImageError, TorchspecError) as error:
                _fail(future, TargetError(str(error)))
            except Exception as error:  # vLLM refuses requests in many ways; each is an answer  # noqa: BLE001
                _fail(future, TargetError(f"vLLM refuses the request: {error}"))

        if not self._thread.is_alive():
            _fail(future, TargetError("vLLM has stopped"))
        self._inbox.put(guarded)
        return future

    def _add(self, name: str, input_ids: Sequence[int], images: Images, params: Any) -> None:
        from vllm import TokensPrompt

        try:
            prompt: Any = TokensPrompt(prompt_token_ids=list(input_ids))
            if images:
                prompt = prompt_with_images(self._engine, input_ids, images)
            self._engine.add_request(name, prompt, params)
        except Exception:
            self._captures.pop(name, None)
            self._writings.pop(name, None)
            raise

    def _work(self, ready: Future[None]) -> None:
        try:
            self._build()
        except BaseException as error:  # goes to the thread that waits  # noqa: BLE001
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            self._loop()
        except BaseException as error:
            log.exception("vLLM's engine died")
            self._fail_all(TargetError(f"vLLM's engine died: {type(error).__name__}: {error}"))
            os._exit(70)  # its state is unknown: whoever watches this process starts another

    def _build(self) -> None:
        from vllm import EngineArgs, LLMEngine, envs
        from vllm.transformers_utils.config import get_config

        settings = self._settings
        config = get_config(str(settings.target), settings.trust_remote_code).get_text_config()
        layers, context = config.num_hidden_layers, config.max_position_embeddings
        arguments = engine_arguments(settings, layers, context)
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._inside = not envs.VLLM_ENABLE_V1_MULTIPROCESSING
        model = self._engine.model_config
        self.facts = Facts(
            engine="vllm",
            engine_version=version(),
            layers=layers,
            hidden_size=model.get_hidden_size(),
            itemsize=model.dtype.itemsize,
            context=context,
            vocab_size=model.get_vocab_size(),
            norm_state="pre_norm",
            no_images=None,  # until shown otherwise
        )

    def _loop(self) -> None:
        while True:
            busy = bool(self._captures or self._writings)
            if not self._take_in(wait=not busy):
                return
            if not (self._captures or self._writings):
                continue
            if self._inside or self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        self._finish(output)
            else:  # an engine core of its own process writes records by itself, and a step would wait for a request
                time.sleep(POLL_SECONDS)
            self._collect_records()

    def _take_in(self, *, wait: bool) -> bool:
        """Begin what has arrived; False when the runner is closed."""
        while True:
            try:
                begin = self._inbox.get(timeout=IDLE_SECONDS) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if begin is None:
                return False
            begin()
            wait = False

    def _finish(self, output: Any) -> None:
        capture = self._captures.get(output.request_id)
        if capture is not None:
            capture.finished_at = time.monotonic()
            return
        writing = self._writings.pop(output.request_id)
        (text,) = output.outputs
        metrics = text.spec_decode_metrics
        accepted = None if metrics is None else tuple(metrics.per_step_accepted)
        written = ServedText(
            tokens=tuple(text.token_ids),
            accepted=accepted,
            rounds=None if accepted is None else len(accepted),
            accepted_tokens=None if accepted is None else sum(accepted),
        )
        with suppress(InvalidStateError):  # given up meanwhile
            writing.future.set_result(written)

    def _collect_records(self) -> None:
        """Records appear some steps after their request has finished; vLLM says nothing when they do."""
        assert self._store is not None or not self._captures
        for record_id, capture in list(self._captures.items()):
            if capture.finished_at is None or self._store is None:
                continue
            reason = failure_of(self._store, record_id)
            try:
                if reason is None:
                    self._store.find(record_id)
            except MissingRecordError:
                if time.monotonic() - capture.finished_at < RECORD_SECONDS:
                    continue
                reason = f"vLLM finished the request but wrote no record within {RECORD_SECONDS:.0f} s"
            except FeatureStoreError as error:
                reason = str(error)
            del self._captures[record_id]
            if reason is not None:
                _fail(capture.future, TargetError(reason))
            else:
                with suppress(InvalidStateError):
                    capture.future.set_result(None)

    def _fail_all(self, error: Exception) -> None:
        futures: list[Future[Any]] = [entry.future for entry in self._captures.values()]
        for future in futures + [entry.future for entry in self._writings.values()]:
            _fail(future, error)

    def _prove_capture(self) -> None:
        """Two tokens through the whole road: connector, store and report."""
        assert self._store is not None
        self._capture(PROOF, [0, 1]).result(timeout=PROOF_SECONDS)
        ref = self._store.find(PROOF)
        self._store.remove(ref)
        if ref.length != 2:
            raise UnavailableError(f"vLLM {version()} captured {ref.length} tokens of 2: it has changed since {TESTED}")


def _fail(future: Future[Any], error: Exception) -> None:
    with suppress(InvalidStateError):
        future.set_exception(error)


def version() -> str:
    """The module's own: its distribution has other names in other builds."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def check_version() -> None:
    """A version that was not tested is said aloud; one without what we stand on is refused."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as module

    base = getattr(module, "ExampleHiddenStatesConnector", None)
    missing = [name for name in NEEDED if not hasattr(base, name)] + [
        name for name in ("PendingSave", "extract_from_kv_cache") if not hasattr(module, name)
    ]
    if base is None or missing:
        raise UnavailableError(
            f"vLLM {version()} has moved: its connector of hidden states lacks {', '.join(missing)}. Tested versions: "
            f"{', '.join(TESTED)}; `torchspec engine install vllm` installs one"
        )
    if version() not in TESTED:
        log.warning("vLLM %s was not tested with this torchspec; tested: %s", version(), ", ".join(TESTED))
