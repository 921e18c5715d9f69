"""Whom a remote engine speaks to: a worker that answers, is the right one for this run, and whose features can be had
here. When one is lost, the next call is to another.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.core.errors import FeatureStoreError, TargetError
from torchspec.core.interfaces.engine import EngineOptions, TargetSpec
from torchspec.core.interfaces.features import FeatureStore
from torchspec.core.workers import protocol
from torchspec.core.workers.client import EngineLostError, WorkerClient
from torchspec.core.workers.delivery import STREAM, open_delivery
from torchspec.core.workers.place import Place

log = logging.getLogger(__name__)

MOST_FAILURES = 3
BETWEEN_RANKS = 0.5


@dataclass(frozen=True, kw_only=True)
class Session:
    """A worker that was found to be the right one, and the store it writes into."""

    client: WorkerClient
    store: FeatureStore | None
    facts: dict[str, Any]

    @property
    def row_bytes(self) -> int:
        """Of a captured token."""
        facts = self.facts
        return 16 + (len(facts["taps"]) + 1) * int(facts["hidden_size"]) * int(facts["itemsize"])


class Link:
    """Several threads may call; one of them looks for the next worker."""

    def __init__(self, name: str, options: EngineOptions, place: Place, spec: TargetSpec, draft: Path | None) -> None:
        self._name, self._options, self._place, self._spec, self._draft = name, options, place, spec, draft
        self._meeting = threading.RLock()
        self._stores: dict[str, FeatureStore] = {}
        self._closed = False
        self.session: Session | None = None
        """Whom it speaks to now; None between a worker that was lost and the next."""

    def close(self) -> None:
        """Whatever its workers' features were taken from is let go of."""
        self._closed = True
        for store in self._stores.values():
            store.close()

    def call(self, path: str, message: dict[str, Any], what: str) -> tuple[Session, dict[str, Any]]:
        """The answer, and whose it is. EngineLostError: the next call will be to another worker."""
        session = self.connected()
        try:
            seconds = self._options.process.call_timeout
            return session, session.client.call(path, message, seconds=seconds, what=what)
        except EngineLostError as error:
            self._lose(session, error)
            raise

    def connected(self) -> Session:
        """TargetError when there is no worker in time, or not one for this run."""
        with self._meeting:
            if self._closed:
                raise RuntimeError(f"the engine of {self._spec.path} is closed")
            if self.session is None:
                self.session = self._connect()
            return self.session

    def _connect(self) -> Session:
        """A worker that answers. One that dies before it does is waited for again."""
        for attempt in itertools.count(1):
            client = self._place.client()
            try:
                facts = client.call(protocol.HELLO, {}, seconds=30, what="who it is")
            except EngineLostError as error:
                if attempt == MOST_FAILURES:
                    raise TargetError(str(error)) from error
                self._place.lost(client)
                continue
            self._check_facts(client, facts)
            return Session(client=client, store=self._opened(client, facts), facts=facts)
        raise AssertionError

    def _lose(self, session: Session, error: EngineLostError) -> None:
        with self._meeting:
            if self.session is session:  # else another thread found out before
                log.warning("%s", error)
                self._place.lost(session.client)
                self.session = None
        # One rank after the other, so that a sample that kills the engine does not meet other ranks' every time.
        time.sleep(BETWEEN_RANKS * self._options.local_rank)

    def _check_facts(self, client: WorkerClient, facts: dict[str, Any]) -> None:
        """TargetError with everything about a worker that is not what this run needs."""
        spec, options = self._spec, self._options
        wanted: dict[str, Any] = {
            "engine": self._name,
            "layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "taps": list(options.taps),
            "draft": None if self._draft is None else str(self._draft),
        }
        wrong = [f"{name} is {facts.get(name)!r}, needed {value!r}" for name, value in wanted.items()
                 if facts.get(name) != value]  # fmt: skip
        if options.images and facts.get("no_images") is not None:
            wrong.append(f"it takes no images of this target: {facts['no_images']}")
        if wrong:
            raise TargetError(
                f"the worker at {client.url} (target {facts.get('target')}) is not the one for this run:\n    "
                + "\n    ".join(wrong)
            )

    def _opened(self, client: WorkerClient, facts: dict[str, Any]) -> FeatureStore | None:
        """Where this worker's features are taken from."""
        if not self._options.taps:
            return None
        known = json.dumps([facts["delivery"], facts["session"] if facts["delivery"]["kind"] == STREAM else ""])
        try:
            if known not in self._stores:  # a worker that came back may deliver as the one before
                self._stores[known] = open_delivery(facts["delivery"], self._options.device, client)
            return self._stores[known]
        except FeatureStoreError as error:
            raise TargetError(
                f"features of the worker at {client.url} cannot be read here: {error}. With features in shared memory, "
                "this process and the worker must run on one machine and share its memory"
            ) from error
