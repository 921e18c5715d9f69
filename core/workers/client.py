"""Calls to a worker, with a deadline each and a word of what is waited for."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any
from urllib.parse import urlsplit

from torchspec.core.errors import StoreLostError, TargetError
from torchspec.core.workers import protocol

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""Beyond what the worker was given, for its answer to arrive."""

FIRST_WORD, BETWEEN_WORDS = 15.0, 30.0
CONNECT_SECONDS = 10.0


class EngineLostError(Exception):
    """The worker is not there, or not in its right mind: it may be another one the next time."""


class WorkerClient:
    """One worker at `url` (http://host:port). May be used from several threads."""

    def __init__(self, url: str, token: str, *, name: str) -> None:
        """TargetError for an address that is none. `name` is the engine's, for messages."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme != "http" or not parts.hostname or port is None:
            raise TargetError(f"{url!r} is not the address of an engine's worker: it looks like http://127.0.0.1:8123")
        self.url, self.name = url, name
        self._host, self._port, self._token = parts.hostname, port, token

    def call(self, path: str, message: dict[str, Any], *, seconds: float, what: str) -> dict[str, Any]:
        """The answer. EngineLostError when the worker is gone or does not answer in time; StoreLostError when it cannot
        deliver; TargetError when it refuses.

        `what` is said while it lasts, and in errors.
        """
        body = json.dumps({"protocol": protocol.PROTOCOL, "seconds": seconds, **message}).encode()
        future: Future[tuple[int, dict[str, Any]]] = Future()

        def post() -> None:
            try:
                future.set_result(self._post(path, body, seconds + GRACE_SECONDS))
            except BaseException as error:  # raised where it is waited for  # noqa: BLE001
                future.set_exception(error)

        # Nobody joins it: Ctrl-C does not have to wait for the engine.
        threading.Thread(target=post, name="engine-call", daemon=True).start()
        answer: dict[str, Any]
        status, answer = wait_aloud(future.result, f"{self.name}: {what}", seconds + GRACE_SECONDS)
        if status == 200:
            return answer
        error = answer.get("error", f"status {status}")
        if status == 504:
            raise EngineLostError(f"{what}: {error}")
        if status == 503:
            raise StoreLostError(str(error))
        if status == 401:
            raise TargetError(f"the {self.name} worker at {self.url} refuses us: {error}. {_TOKEN_REMEDY}")
        raise TargetError(f"the {self.name} worker at {self.url} refuses ({what}): {error}")

    def fetch(self, path: str, message: dict[str, Any], *, seconds: float) -> bytes | None:
        """The bytes that are the answer; None where there are none (410). Errors as of `call`."""
        body = json.dumps({"protocol": protocol.PROTOCOL, "seconds": seconds, **message}).encode()
        status, content = self._exchange(path, body, seconds)
        if status == 200:
            return content
        if status == 410:
            return None
        said = content[:500].decode(errors="replace")
        raise TargetError(f"the {self.name} worker at {self.url} refuses ({path}): {said}")

    def _post(self, path: str, body: bytes, seconds: float) -> tuple[int, dict[str, Any]]:
        status, content = self._exchange(path, body, seconds)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise TargetError(f"what answers at {self.url} is no worker of torchspec (status {status})")
        return status, answer

    def _exchange(self, path: str, body: bytes, seconds: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            detail = str(error) or type(error).__name__
            raise EngineLostError(f"the {self.name} worker at {self.url} does not answer: {detail}") from error
        finally:
            connection.close()


_TOKEN_REMEDY = f"Set {protocol.TOKEN_VARIABLE} to the token it was started with"


def wait_aloud(result: Callable[[float], Any], what: str, seconds: float) -> Any:
    """`result(timeout)` until it returns; says what it waits for after a while, and how long it will at most."""
    start = time.monotonic()
    pause = FIRST_WORD
    while True:
        try:
            return result(pause)
        except NotYet:
            passed = time.monotonic() - start
            if passed > seconds + GRACE_SECONDS:
                raise EngineLostError(f"{what}: no answer after {passed:.0f} s") from None
            log.info("waiting for %s, %.0f s of at most %.0f s", what, passed, seconds)
            pause = BETWEEN_WORDS
