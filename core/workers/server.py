"""The worker's HTTP server: control messages only, every one of them authorised, a thread for each."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from torchspec.core.errors import (
    FeatureStoreError,
    MissingRecordError,
    StoreFullError,
    StoreLostError,
    TorchspecError,
)
from torchspec.core.features.directory import DirectoryStore
from torchspec.core.features.parts import part_of
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.interfaces.features import FeatureStore, RecordRef
from torchspec.core.workers import protocol
from torchspec.core.workers.admission import Admission
from torchspec.core.workers.captures import Capture, Captures
from torchspec.core.workers.delivery import STREAM, put_in_time
from torchspec.core.workers.protocol import PROTOCOL, ProtocolError, field, record_id
from torchspec.core.workers.requests import asks_of, capture_request
from torchspec.core.workers.runner import Landing, Runner, WorkerSettings

log = logging.getLogger(__name__)

HEADER_BYTES = 4096
"""Of a record's file, beside its rows; more than it is."""


class Worker:
    """What the server's paths do. `store`: where an engine with processes of its own puts records."""

    def __init__(
        self,
        runner: Runner,
        settings: WorkerSettings,
        store: DirectoryStore | None,
        delivery: tuple[FeatureStore, dict[str, Any]] | None = None,
        *,
        streamed: bool = False,
    ) -> None:
        """`delivery` None: callers take records from `store`, which they open or, `streamed`, ask this worker for."""
        self.runner, self.settings = runner, settings
        self.landing: Landing | None = store if runner.landing is None else runner.landing
        self.delivery: FeatureStore | None = store
        self.delivery_facts: dict[str, Any] | None = None
        if store is not None:
            self.delivery_facts = {"kind": STREAM} if streamed else {"kind": "shared", "root": str(store.root)}
        self.files = store if streamed else None
        if delivery is not None:
            self.delivery, self.delivery_facts = delivery
        self.admission = None if self.delivery is None else Admission(self.delivery, settings.store_bytes)
        self.captures = Captures(runner.capture, self.landing)
        self.stopping = threading.Event()
        self.session = secrets.token_hex(4)  # record ids of one worker are never another one's

    def hello(self, _: dict[str, Any]) -> dict[str, Any]:
        """Facts, and where features come from."""
        settings = self.settings
        return {
            "protocol": PROTOCOL,
            **asdict(self.runner.facts),
            "target": str(settings.target),
            "taps": list(settings.taps),
            "draft": None if settings.draft is None else str(settings.draft),
            "draft_length": settings.draft_length,
            "delivery": self.delivery_facts,
            "store_bytes": settings.store_bytes,
            "session": self.session,
        }

    def capture(self, message: dict[str, Any]) -> dict[str, Any]:
        """A record for each sample, or the reason why there is none."""
        if self.delivery is None or self.admission is None:
            raise ProtocolError("this worker was started without layers to capture")
        requests = [capture_request(each) for each in field(message, "samples", list)]
        deadline = time.monotonic() + field(message, "seconds", (int, float))
        with self.admission.room_for(sum(map(self._nbytes, requests)), deadline):
            captures = self.captures.enter(requests, deadline)
            kept: set[str] = set()
            try:
                return {
                    "results": [
                        self._captured(request, capture, deadline, kept)
                        for request, capture in zip(requests, captures, strict=True)
                    ]
                }
            finally:
                for capture in captures:
                    self.captures.leave(capture, keep=capture.request.record_id in kept)

    def _nbytes(self, request: CaptureRequest) -> int:
        facts, taps = self.runner.facts, len(self.settings.taps)
        row = 8 + 8 + (taps + 1) * facts.hidden_size * facts.itemsize  # id and row sum beside the hidden states
        rows = sum(stop - start for start, stop in request.parts[request.part]) if request.parts else 0
        if request.parts and self.delivery is self.landing:  # the whole record is there beside its parts
            rows += -(-len(request.input_ids) // len(request.parts))
        return HEADER_BYTES + (rows or len(request.input_ids)) * row

    def _captured(self, request: CaptureRequest, capture: Capture, deadline: float, kept: set[str]) -> dict[str, Any]:
        """`kept` gets the record's id where the record itself goes to the caller."""
        record_id = request.record_id
        try:
            _wait(capture.future, deadline)
            ref = self.captures.ref(capture)
            if ref.length != len(request.input_ids):
                return {"id": record_id, "reason": f"{ref.length} tokens were captured of {len(request.input_ids)}"}
            ref = self._delivered(request, ref, kept, deadline)
        except (OutOfTimeError, StoreFullError, StoreLostError):
            raise  # of the whole request: not this sample's fault
        except TorchspecError as error:
            return {"id": record_id, "reason": str(error)}
        return {"id": ref.record_id, "length": ref.length, "checksum": ref.checksum}

    def _delivered(self, request: CaptureRequest, ref: RecordRef, kept: set[str], deadline: float) -> RecordRef:
        """The caller's part, where it takes it from."""
        assert self.landing is not None
        assert self.delivery is not None
        if not request.parts and self.delivery is self.landing:
            kept.add(ref.record_id)
            return ref
        features = self.landing.get(ref)
        if not request.parts:
            return put_in_time(self.delivery, ref.record_id, features, deadline)
        part = part_of(features, request.parts[request.part])
        return put_in_time(self.delivery, f"{ref.record_id}.{request.part}", part, deadline)

    def write(self, message: dict[str, Any]) -> dict[str, Any]:
        """New tokens for each prompt."""
        deadline = time.monotonic() + field(message, "seconds", (int, float))
        work = self.runner.write(asks_of(message))
        for future in work:
            self.captures.activity.follow(future, lambda text: len(text.tokens))
        return {"results": [asdict(_wait(future, deadline)) for future in work]}

    def record(self, message: dict[str, Any]) -> Path:
        """The file of a record."""
        path = self._streamed().file(record_id(message))
        if not path.exists():
            raise MissingRecordError(f"record {message['id']!r} is not here: never captured, or already taken")
        return path

    def drop(self, message: dict[str, Any]) -> dict[str, Any]:
        """A record that was taken."""
        self._streamed().file(record_id(message)).unlink(missing_ok=True)
        return {}

    def _streamed(self) -> DirectoryStore:
        if self.files is None:
            raise ProtocolError("this worker does not deliver records itself")
        return self.files

    def counters(self, _: dict[str, Any]) -> dict[str, Any]:
        return asdict(self.runner.counters())

    def usage(self, _: dict[str, Any]) -> dict[str, Any]:
        """What the engine has done since it started, and what waits to be taken."""
        held = None if self.delivery is None else self.delivery.usage()
        return {
            **self.captures.activity.told(),
            "records": 0 if held is None else held.records,
            "nbytes": 0 if held is None else held.nbytes,
        }

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
        raise OutOfTimeError("the engine did not finish in the time given (engine.call_timeout)") from None


def make_server(worker: Worker, host: str, port: int, token: str) -> ThreadingHTTPServer:
    """Bound and listening; `serve_forever` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, answer = self._answer()
            if isinstance(answer, Path):
                try:
                    file = answer.open("rb")
                except FileNotFoundError:
                    status, answer = 410, {"error": "the record has just been taken"}
                else:
                    with file:
                        self._begin(status, "application/octet-stream", os.fstat(file.fileno()).st_size)
                        self.connection.sendfile(file)
                    return
            body = json.dumps(answer).encode()
            self._begin(status, "application/json", len(body))
            self.wfile.write(body)

        def _begin(self, status: int, kind: str, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def _answer(self) -> tuple[int, dict[str, Any] | Path]:
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
            except StoreLostError as error:
                return 503, {"error": str(error)}
            except MissingRecordError as error:
                return 410, {"error": str(error)}
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


_PATHS: dict[str, Callable[[Worker, dict[str, Any]], dict[str, Any] | Path]] = {
    protocol.HELLO: Worker.hello,
    protocol.CAPTURE: Worker.capture,
    protocol.WRITE: Worker.write,
    protocol.COUNTERS: Worker.counters,
    protocol.STOP: Worker.stop,
    protocol.USAGE: Worker.usage,
    protocol.RECORD: Worker.record,
    protocol.DROP: Worker.drop,
}


def shut_down(server: ThreadingHTTPServer, worker: Worker) -> None:
    """Answer no more, then let the engine go."""
    server.shutdown()
    server.server_close()
    worker.runner.close()
    if worker.delivery is not None:
        worker.delivery.close()
