"""The worker's HTTP server: control messages only, every one of them authorised, a thread for each."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from torchspec.backends.worker import protocol
from torchspec.backends.worker.admission import Admission
from torchspec.backends.worker.protocol import PROTOCOL, ProtocolError, field, token_ids
from torchspec.backends.worker.runner import Ask, Runner, WorkerSettings
from torchspec.core.errors import FeatureStoreError, TorchspecError
from torchspec.core.features.directory import DirectoryStore

log = logging.getLogger(__name__)

HEADER_BYTES = 4096
"""Of a record's file, beside its rows; more than it is."""


class Worker:
    """What the server's paths do."""

    def __init__(self, runner: Runner, settings: WorkerSettings, store: DirectoryStore | None) -> None:
        self.runner, self.settings, self.store = runner, settings, store
        self.admission = None if store is None else Admission(store, settings.store_bytes)
        self.stopping = threading.Event()
        self.session = secrets.token_hex(4)  # record ids of one worker are never another one's

    def hello(self, _: dict[str, Any]) -> dict[str, Any]:
        """Facts, and proof that both sides see the same store: a file there with a word in it."""
        settings = self.settings
        return {
            "protocol": PROTOCOL,
            **asdict(self.runner.facts),
            "target": str(settings.target),
            "taps": list(settings.taps),
            "draft": None if settings.draft is None else str(settings.draft),
            "draft_length": settings.draft_length,
            "store": None if self.store is None else str(self.store.root),
            "store_bytes": settings.store_bytes,
            "session": self.session,
        }

    def capture(self, message: dict[str, Any]) -> dict[str, Any]:
        """A record in the store for each sample, or the reason why there is none."""
        if self.store is None or self.admission is None:
            raise ProtocolError("this worker was started without layers to capture")
        samples = [(protocol.record_id(each), token_ids(each)) for each in field(message, "samples", list)]
        deadline = time.monotonic() + field(message, "seconds", (int, float))
        facts, taps = self.runner.facts, len(self.settings.taps)
        row = 8 + 8 + (taps + 1) * facts.hidden_size * facts.itemsize  # id and row sum beside the hidden states
        with self.admission.room_for(sum(HEADER_BYTES + len(ids) * row for _, ids in samples), deadline):
            work = [(record_id, ids, self.runner.capture(record_id, ids)) for record_id, ids in samples]
            try:
                return {
                    "results": [self._captured(record_id, ids, future, deadline) for record_id, ids, future in work]
                }
            except OutOfTimeError:
                for record_id, _, future in work:  # nobody will come for what is written after all
                    future.cancel()
                    future.add_done_callback(partial(self._drop, record_id))
                raise

    def _drop(self, record_id: str, _: Future[None]) -> None:
        assert self.store is not None
        with suppress(FeatureStoreError):
            self.store.remove(self.store.find(record_id))

    def _captured(self, record_id: str, ids: list[int], future: Future[None], deadline: float) -> dict[str, Any]:
        assert self.store is not None
        try:
            _wait(future, deadline)
            ref = self.store.find(record_id)
        except OutOfTimeError:
            raise  # of the whole request: an engine that does not come back to one sample needs another look
        except TorchspecError as error:
            return {"id": record_id, "reason": str(error)}
        if ref.length != len(ids):
            self.store.remove(ref)
            return {"id": record_id, "reason": f"{ref.length} tokens were captured of {len(ids)}"}
        return {"id": record_id, "length": ref.length, "checksum": ref.checksum}

    def write(self, message: dict[str, Any]) -> dict[str, Any]:
        """New tokens for each prompt."""
        deadline = time.monotonic() + field(message, "seconds", (int, float))
        stop = field(message, "stop", list)
        asks = [
            Ask(
                input_ids=token_ids(each),
                max_new_tokens=field(message, "max_new_tokens", int),
                temperature=float(field(message, "temperature", (int, float))),
                seed=field(each, "seed", int),
                stop=stop,
            )
            for each in field(message, "prompts", list)
        ]
        work = [self.runner.write(ask) for ask in asks]
        return {"results": [asdict(_wait(future, deadline)) for future in work]}

    def counters(self, _: dict[str, Any]) -> dict[str, Any]:
        return asdict(self.runner.counters())

    def stop(self, message: dict[str, Any]) -> dict[str, Any]:
        """In order; or with `abort` at once, by a client that has given up on this engine."""
        if message.get("abort"):
            threading.Timer(0.2, os._exit, (70,)).start()
        self.stopping.set()
        return {}


class OutOfTimeError(TorchspecError):
    """The engine did not finish within the time that the client gave."""


def _wait(future: Future[Any], deadline: float) -> Any:
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except NotInTime:
        future.cancel()
        raise OutOfTimeError("the engine did not finish in the time given (engine.call_timeout)") from None


def make_server(worker: Worker, host: str, port: int, token: str) -> ThreadingHTTPServer:
    """Bound and listening; `serve_forever` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, answer = self._answer()
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> tuple[int, dict[str, Any]]:
            length = self.headers.get("Content-Length") or "0"
            if not protocol.authorised(dict(self.headers.items()), token):
                self.close_connection = True  # whoever it is, its message is not read
                return 401, {"error": "the token is missing or not this worker's"}
            if not length.isdecimal():
                self.close_connection = True
                return 400, {"error": f"Content-Length is {length!r}"}
            size = int(length)
            if size > protocol.MOST_BYTES:
                self.close_connection = True
                return 413, {"error": f"a message of {size} bytes; at most {protocol.MOST_BYTES}"}
            work = _PATHS.get(self.path)
            if work is None:
                self.rfile.read(size)
                return 404, {"error": f"no such path: {self.path}", "protocol": PROTOCOL}
            try:
                message = json.loads(self.rfile.read(size) or b"{}")
                if not isinstance(message, dict) or message.get("protocol") != PROTOCOL:
                    theirs = message.get("protocol") if isinstance(message, dict) else None
                    return 409, {"error": f"this worker speaks protocol {PROTOCOL}, the client {theirs}"}
                return 200, work(worker, message)
            except (ProtocolError, json.JSONDecodeError) as error:
                return 400, {"error": f"not a message of this protocol: {error}"}
            except FeatureStoreError as error:
                return 507, {"error": str(error)}
            except OutOfTimeError as error:
                return 504, {"error": str(error)}
            except TorchspecError as error:
                return 500, {"error": str(error)}
            except Exception as error:  # the client must hear of it, whatever it is
                log.exception("%s failed", self.path)
                return 500, {"error": f"{type(error).__name__}: {error}"}

        def log_message(self, format: str, *args: object) -> None:
            log.debug("%s " + format, self.client_address, *args)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    return Server((host, port), Handler)


_PATHS = {
    protocol.HELLO: Worker.hello,
    protocol.CAPTURE: Worker.capture,
    protocol.WRITE: Worker.write,
    protocol.COUNTERS: Worker.counters,
    protocol.STOP: Worker.stop,
}


def shut_down(server: ThreadingHTTPServer, worker: Worker) -> None:
    """Answer no more, then let the engine go."""
    server.shutdown()
    server.server_close()
    worker.runner.close()
