"""SGLang as a worker's engine: requests go to its own processes through its event loop, which has a thread here."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from torchspec.backends.sglang.worker.images import ImageInputs
from torchspec.backends.sglang.worker.orders import request_id
from torchspec.backends.sglang.worker.plugin import ACCEPTED
from torchspec.core.errors import FeatureStoreError, TorchspecError, UnavailableError
from torchspec.core.interfaces.engine import CaptureRequest, ServedText, ServingCounters
from torchspec.core.workers.runner import Ask, Facts, Landing, WorkerSettings, refuse_images, refuse_sources


class SglangError(TorchspecError):
    """SGLang refused a request or ended."""


EXIT_DEAD = 70
"""Of a worker whose engine is in a state that nobody knows."""


class SglangRunner:
    """`Runner`. Whatever is submitted while other work runs joins its batches."""

    landing: Landing | None = None

    def __init__(self, engine: Any, settings: WorkerSettings, facts: Facts) -> None:
        """Call from the main thread: it then hears of the death of SGLang's processes."""
        self.facts = facts
        self._engine, self._settings = engine, settings
        self.images = ImageInputs(settings.target, trust_remote_code=settings.trust_remote_code)
        self._numbers = itertools.count()
        self._counting = threading.Lock()
        self._rounds: list[int] = [0] * (settings.draft_length + 1)  # by accepted tokens
        self._loop: asyncio.AbstractEventLoop = engine.loop
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            # SGLang's processes send this when they fail. Whoever watches this process starts another, and what waits
            # is asked for again; an answer now would be counted as the samples' own failure.
            signal.signal(signal.SIGQUIT, lambda *_: os._exit(EXIT_DEAD))

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        refuse_images(self.facts, samples)
        return [asyncio.run_coroutine_threadsafe(self._capture(each), self._loop) for each in samples]

    def write(self, asks: Sequence[Ask]) -> list[Future[ServedText]]:
        refuse_images(self.facts, asks)
        refuse_sources(self.facts.engine, asks)
        return [asyncio.run_coroutine_threadsafe(self._write(ask), self._loop) for ask in asks]

    def counters(self) -> ServingCounters:
        with self._counting:
            rounds = list(self._rounds)
        length = self._settings.draft_length
        return ServingCounters(
            rounds=sum(rounds),
            drafted=sum(rounds) * length,
            accepted=sum(accepted * count for accepted, count in enumerate(rounds)),
            per_position=tuple(sum(rounds[position:]) for position in range(1, length + 1)),
        )

    def forget_counters(self) -> None:
        """Nobody asked for the work that they count."""
        with self._counting:
            self._rounds = [0] * len(self._rounds)

    def close(self) -> None:
        self._end("the worker is closing")
        self._engine.shutdown()  # kills its processes and waits until the device is free
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10.0)
        self.images.close()

    def _end(self, reason: str) -> None:
        def end() -> None:
            if not self._ended.done():
                self._ended.set_result(reason)

        self._loop.call_soon_threadsafe(end)

    async def _capture(self, sample: CaptureRequest) -> None:
        if not self._settings.taps:
            raise FeatureStoreError("this SGLang worker was started without layers to capture")
        ids = list(sample.input_ids)
        self._check(ids, at_most=self.facts.context)
        beside = await self.images.of(ids, sample.images)
        try:
            answer = await self._ask(
                request_id(sample.record_id, next(self._numbers)),
                ids,
                {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
                return_hidden_states=True,
                **beside,
            )
        except SglangError as error:
            raise FeatureStoreError(str(error)) from error
        if answer["meta_info"].get("hidden_states") != [[float(len(ids))]]:
            raise UnavailableError(
                "SGLang finished a capture without torchspec's plug-in: its scheduler didn't load it, or lost it "
                f"(SGLang {self.facts.engine_version})"
            )

    async def _write(self, ask: Ask) -> ServedText:
        if ask.temperature > 0 and self._settings.draft is not None and self._settings.device == "cpu":
            raise SglangError(
                "SGLang verifies drafts greedily on a CPU, at any temperature: ask at temperature 0 there"
            )
        ids = list(ask.input_ids)
        self._check(ids, at_most=self.facts.context - 1)
        stop = set(ask.stop)
        answer = await self._ask(
            f"torchspec-write/{next(self._numbers)}",
            ids,
            {
                "max_new_tokens": min(ask.max_new_tokens, self.facts.context - len(ids)),
                "temperature": ask.temperature,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "sampling_seed": prompt_seed(ask.seed, ids),
                "stop_token_ids": sorted(stop),
                "ignore_eos": not stop,
            },
            **await self.images.of(ids, ask.images),
        )
        facts = answer["meta_info"]
        reason = facts["finish_reason"]
        if reason["type"] == "stop" and reason.get("matched") not in stop:
            raise SglangError(f"SGLang ended a text where nobody asked it to: {reason}")
        tokens = tuple(int(token) for token in answer["output_ids"])
        if self._settings.draft is None:
            return ServedText(tokens=tokens)
        if len(tokens) > 1 and ACCEPTED not in facts:
            return ServedText(tokens=tokens)
        accepted = tuple(int(count) for count in facts.get(ACCEPTED, ()) if count is not None)
        with self._counting:
            for count in accepted:
                self._rounds[count] += 1
        return ServedText(tokens=tokens, accepted=accepted, rounds=len(accepted), accepted_tokens=sum(accepted))

    def _check(self, ids: list[int], *, at_most: int) -> None:
        if not 0 < len(ids) <= at_most:
            raise SglangError(f"a prompt of {len(ids)} tokens: it must have 1 to {at_most}, the target's context")
        if not all(0 <= token < self.facts.vocab_size for token in ids):
            raise SglangError(f"a prompt has token ids outside the target's vocabulary of {self.facts.vocab_size}")

    async def _ask(self, rid: str, ids: list[int], sampling: dict[str, Any], **more: Any) -> dict[str, Any]:
        """SGLang's answer; SglangError with its reason when there is none."""
        answer = asyncio.ensure_future(
            self._engine.async_generate(input_ids=ids, rid=rid, sampling_params=sampling, **more)
        )
        try:
            await asyncio.wait({answer, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._engine.tokenizer_manager.abort_request(rid=rid)
            raise
        finally:
            if not answer.done():
                answer.cancel()
        if self._ended.done() and not answer.done():
            raise SglangError(f"SGLang has ended: {self._ended.result()}")
        try:
            found: dict[str, Any] = answer.result()
        except Exception as error:  # refusals come as errors of many kinds
            raise SglangError(str(getattr(error, "detail", None) or error)) from error
        reason = found["meta_info"].get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise SglangError(f"SGLang gave up: {reason.get('message')}")
        return found


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """Of this seed and this prompt, so that a prompt's draws depend on nothing else; other prompts draw independently.

    Positive and below 2**63, as SGLang wants it.
    """
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
