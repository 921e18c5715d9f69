"""An engine made of arithmetic, for a real worker in a process of its own; certain tokens make it misbehave."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from torchspec.core.errors import TargetError
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.engine import CaptureRequest, Images, ServedText, ServingCounters
from torchspec.core.interfaces.features import Features
from torchspec.core.models.images import ImageError, open_image
from torchspec.core.workers.runner import Ask, Facts, Landing, WorkerSettings

DIES, DIES_ONCE, HANGS, REFUSES, SHORT, OTHER, WAITS = 91, 92, 93, 94, 95, 96, 97


def brightness(images: Images) -> int:
    """The first bytes of the images' pixels, added."""
    try:
        return sum(open_image(image).tobytes()[0] for image in images)
    except ImageError as error:
        raise TargetError(str(error)) from error


def features_of(input_ids: Sequence[int], taps: tuple[int, ...], hidden: int, bright: int = 0) -> Features:
    ids_T = torch.tensor(list(input_ids))
    base_TH = torch.sin(ids_T[:, None] * torch.arange(1, hidden + 1)).float() + bright
    return Features(
        input_ids_T=ids_T,
        taps_TNH=torch.stack([base_TH + tap for tap in taps], 1),
        last_TH=base_TH + 100,
        tap_layers=taps,
        norm_state="pre_norm",
    )


class FakeRunner:
    landing: Landing | None = None

    def __init__(self, settings: WorkerSettings) -> None:
        if "says" in settings.options:
            print(settings.options["says"], flush=True)
        if "fails" in settings.options:
            raise TargetError(settings.options["fails"])
        if "once" in settings.options:
            mark = Path(settings.options["once"])
            if mark.exists():
                raise TargetError("it was here before")
            mark.write_text("")
        if "killed" in settings.options:
            count = Path(settings.options["killed"][0])
            times = int(count.read_text()) if count.exists() else 0
            count.write_text(str(times + 1))
            if times < settings.options["killed"][1]:
                os.kill(os.getpid(), signal.SIGKILL)
        if "exits" in settings.options:
            print("the engine says why", flush=True)
            os._exit(3)
        time.sleep(settings.options.get("sleeps", 0))
        self.settings = settings
        self.store = None if settings.store is None else SharedMemoryStore(root=settings.store)
        self.pool = ThreadPoolExecutor(8)
        self.rounds = 0
        config = json.loads((settings.target / "config.json").read_text())
        self.facts = Facts(
            engine="fake",
            engine_version="1.2",
            layers=config["num_hidden_layers"],
            hidden_size=settings.options.get("hidden", config["hidden_size"]),
            itemsize=4,
            context=512,
            vocab_size=300,
            norm_state="pre_norm",
            no_images=settings.options.get("no_images"),
        )

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        if "marks" in self.settings.options:
            line = json.dumps([[each.record_id, *each.input_ids] for each in samples])
            with (Path(self.settings.options["marks"]) / "asked").open("a") as asked:
                asked.write(line + "\n")
        return [self.pool.submit(self._capture, each.record_id, list(each.input_ids), each.images) for each in samples]

    def _capture(self, record_id: str, ids: list[int], images: Images) -> None:
        if DIES in ids:
            os._exit(9)
        if DIES_ONCE in ids:
            mark = Path(self.settings.options["marks"]) / "died"
            if not mark.exists():
                mark.write_text("")
                os._exit(9)
        while WAITS in ids and not (Path(self.settings.options["marks"]) / "go").exists():
            time.sleep(0.02)
        if HANGS in ids:
            time.sleep(60)
        if REFUSES in ids:
            raise TargetError("hidden states that are not finite")
        if SHORT in ids:
            ids = ids[:-1]
        if OTHER in ids:
            ids = [1] * len(ids)
        assert self.store is not None
        self.store.put(record_id, features_of(ids, self.settings.taps, self.facts.hidden_size, brightness(images)))

    def write(self, asks: Sequence[Ask]) -> list[Future[ServedText]]:
        return [self.pool.submit(self._write, ask) for ask in asks]

    def _write(self, ask: Ask) -> ServedText:
        if DIES in ask.input_ids:
            os._exit(9)
        self.rounds += 1
        last = ask.input_ids[-1] + brightness(ask.images)
        tokens = [(last + step + ask.seed % 7 * (ask.temperature > 0)) % 90 for step in range(1, 4)]
        return ServedText(tokens=tuple(tokens[: ask.max_new_tokens]), accepted=(1, 0))

    def counters(self) -> ServingCounters:
        return ServingCounters(rounds=self.rounds, drafted=2 * self.rounds, accepted=self.rounds, per_position=(1, 0))

    def close(self) -> None:
        self.pool.shutdown(wait=False)


def make_runner(settings: WorkerSettings) -> FakeRunner:
    return FakeRunner(settings)
