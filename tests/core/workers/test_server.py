"""The protocol as any client meets it: over a real socket, with a tiny engine behind."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core.errors import TargetError
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.memory import MemoryStore
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.engine import CaptureRequest, DraftSource, ServedText, ServingCounters
from torchspec.core.interfaces.features import Features, RecordRef
from torchspec.core.workers import protocol
from torchspec.core.workers.runner import Ask, Facts, Landing, WorkerSettings
from torchspec.core.workers.server import Worker, make_server, shut_down

TOKEN = "the right one"
TAPS, HIDDEN = (1, 3), 4
ROW_BYTES = 16 + (len(TAPS) + 1) * HIDDEN * 4
CAPACITY = 200_000
MOST = CAPACITY // ROW_BYTES
REFUSED, SHORT, STUCK, BROKEN = 91, 92, 93, 94
"""Tokens that make the engine refuse a sample, cut it, never come back, or fail in a way of its own."""


class TinyRunner:
    landing: Landing | None = None
    facts = Facts(
        engine="tiny", engine_version="1.2", layers=6, hidden_size=HIDDEN, itemsize=4, context=64, vocab_size=100,
        norm_state="pre_norm",
    )  # fmt: skip

    def __init__(self, store: SharedMemoryStore | None) -> None:
        self.store = store
        self.pool = ThreadPoolExecutor(4)
        self.asked: list[Ask] = []
        self.captured: list[str] = []
        self.let_go = threading.Event()
        self.closed = False

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        self.captured += [each.record_id for each in samples]
        return [self.pool.submit(self._capture, each.record_id, list(each.input_ids)) for each in samples]

    def _capture(self, record_id: str, ids: list[int]) -> None:
        assert self.store is not None
        if REFUSED in ids:
            raise TargetError("hidden states that are not finite")
        if BROKEN in ids:
            raise ZeroDivisionError("oh")
        if STUCK in ids:
            self.let_go.wait(20)
        self.store.put(record_id, features(ids[:-1] if SHORT in ids else ids))

    def write(self, asks: Sequence[Ask]) -> list[Future[ServedText]]:
        return [self.answered(ask) for ask in asks]

    def answered(self, ask: Ask) -> Future[ServedText]:
        self.asked.append(ask)
        done: Future[ServedText] = Future()
        if STUCK not in ask.input_ids:
            done.set_result(ServedText(tokens=(ask.input_ids[-1] + 1,), accepted=(1, 0), rounds=2, accepted_tokens=1))
        return done

    def counters(self) -> ServingCounters:
        return ServingCounters(rounds=4, drafted=8, accepted=3, per_position=(2, 1))

    def close(self) -> None:
        self.let_go.set()
        self.pool.shutdown()
        self.closed = True


def features(ids: Sequence[int]) -> Features:
    made = sample_features(len(ids), taps=TAPS, hidden=HIDDEN)
    return Features(**{**vars(made), "input_ids_T": torch.tensor(ids)})


@dataclass(kw_only=True)
class Served:
    """A worker behind its server."""

    worker: Worker
    server: ThreadingHTTPServer
    runner: TinyRunner
    store: SharedMemoryStore | None

    def connect(self) -> http.client.HTTPConnection:
        host, port = self.server.server_address[:2]
        return http.client.HTTPConnection(str(host), port, timeout=5)

    def post(self, path: str, body: object, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        """(status, answer); `body` as JSON, or bytes as they are."""
        connection = self.connect()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def ask(self, path: str, **message: object) -> tuple[int, dict[str, Any]]:
        return self.post(path, {"protocol": protocol.PROTOCOL, **message})

    def capture(self, *samples: list[int], seconds: float = 5) -> tuple[int, dict[str, Any]]:
        named = [{"id": f"s{number}", "input_ids": ids} for number, ids in enumerate(samples)]
        return self.ask(protocol.CAPTURE, samples=named, seconds=seconds)

    def announced(self, path: str, size: int, token: str) -> http.client.HTTPResponse:
        """What is answered to a request that says its size and sends no body."""
        connection = self.connect()
        connection.putrequest("POST", path)
        connection.putheader("Authorization", f"Bearer {token}")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        return connection.getresponse()


def serve(store: SharedMemoryStore | None) -> Served:
    runner = TinyRunner(store)
    settings = WorkerSettings(
        target=Path("/targets/tiny"),
        device="cpu",
        dtype="float32",
        taps=TAPS if store is not None else (),
        store=None if store is None else store.root,
        store_bytes=CAPACITY,
    )
    worker = Worker(runner, settings, store)
    server = make_server(worker, "127.0.0.1", 0, TOKEN)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return Served(worker=worker, server=server, runner=runner, store=store)


@pytest.fixture
def served() -> Iterator[Served]:
    """A worker that captures."""
    store = SharedMemoryStore(capacity=CAPACITY)
    made = serve(store)
    yield made
    shut_down(made.server, made.worker)
    assert made.runner.closed
    store.close()


@pytest.fixture
def writing() -> Iterator[Served]:
    """A worker that captures nothing."""
    made = serve(None)
    yield made
    shut_down(made.server, made.worker)


PATHS = [protocol.HELLO, protocol.CAPTURE, protocol.WRITE, protocol.COUNTERS, protocol.STOP, "/v1/none", "/"]


@pytest.mark.parametrize("token", [None, "", "the wrong one", TOKEN + "x", TOKEN[:-1]])
def test_without_the_token_nothing_is_said(served: Served, token: str | None) -> None:
    for path in PATHS:
        status, answer = served.post(path, {"protocol": protocol.PROTOCOL}, token)
        assert status == 401
        assert answer == {"error": "the token is missing or not this worker's"}
    assert not served.worker.stopping.is_set()


def test_the_message_of_a_stranger_is_not_read(served: Served) -> None:
    """It is answered before a byte of the body is there, and the connection ends."""
    response = served.announced(protocol.CAPTURE, 10_000_000, "wrong")
    assert response.status == 401
    assert response.will_close or response.read() is not None


@pytest.mark.parametrize("length", ["-1", "many", ""])
def test_a_length_that_is_none(served: Served, length: str) -> None:
    connection = served.connect()
    connection.putrequest("POST", protocol.HELLO)
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == (400 if length else 409)
    connection.close()


def test_a_token_in_another_script(served: Served) -> None:
    response = served.announced(protocol.HELLO, 2, "t\xf6ken")
    assert response.status == 401


def test_a_message_that_is_too_long_is_not_read_either(served: Served) -> None:
    response = served.announced(protocol.CAPTURE, protocol.MOST_BYTES + 1, TOKEN)
    assert response.status == 413
    assert "at most 268435456" in json.loads(response.read())["error"]


@pytest.mark.parametrize("message", [{}, {"protocol": 1}, {"protocol": "2"}, [], "hello", 1])
def test_another_protocol_is_refused_with_both_versions(served: Served, message: object) -> None:
    status, answer = served.post(protocol.HELLO, message)
    assert status == 409
    theirs = message.get("protocol") if isinstance(message, dict) else None
    assert answer["error"] == f"this worker speaks protocol {protocol.PROTOCOL}, the client {theirs}"


def test_an_unknown_path(served: Served) -> None:
    """With the version, so that another client's path explains itself; and the connection may go on."""
    connection = served.connect()
    body = json.dumps({"protocol": protocol.PROTOCOL})
    for path, status in (("/v2/hello", 404), (protocol.HELLO, 200)):
        connection.request("POST", path, body, {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == status
        assert answer["protocol"] == protocol.PROTOCOL
    connection.close()


@pytest.mark.parametrize(
    ("path", "message", "complaint"),
    [
        (protocol.CAPTURE, {"seconds": 1}, "'samples' must be"),
        (protocol.CAPTURE, {"samples": [], "seconds": "1"}, "'seconds' must be"),
        (protocol.CAPTURE, {"samples": [], "seconds": True}, "'seconds' must be"),
        (protocol.CAPTURE, {"samples": ["a"], "seconds": 1}, "an object with 'id' is needed"),
        (protocol.CAPTURE, {"samples": [{"id": 3, "input_ids": [1]}], "seconds": 1}, "'id' must be"),
        (protocol.CAPTURE, {"samples": [{"id": "a", "input_ids": []}], "seconds": 1}, "with at least one"),
        (protocol.CAPTURE, {"samples": [{"id": "a", "input_ids": [1.0]}], "seconds": 1}, "list of token ids"),
        (protocol.CAPTURE, {"samples": [{"id": "a", "input_ids": [-1]}], "seconds": 1}, "list of token ids"),
        (protocol.CAPTURE, {"samples": [{"id": "a", "input_ids": [True]}], "seconds": 1}, "list of token ids"),
        *(
            (protocol.CAPTURE, {"samples": [{"id": "a", "input_ids": [1, 2, 3], **wrong}], "seconds": 1}, complaint)
            for wrong, complaint in (
                ({"parts": [[[0, 1]], [[1, 3]]], "part": 2}, "'part' must be one of 2, got 2"),
                ({"parts": [[[0, 1]]], "part": -1}, "'part' must be one of 1, got -1"),
                ({"parts": [[[0, 1]]], "part": True}, "'part' must be one of 1, got True"),
                ({"parts": [[]]}, "a part must be a list of [start, stop) within 3 tokens, got []"),
                ({"parts": [[[2, 2]]]}, "within 3 tokens, got [[2, 2]]"),
                ({"parts": [[[0, 4]]]}, "within 3 tokens, got [[0, 4]]"),
                ({"parts": [[[-1, 2]]]}, "within 3 tokens, got [[-1, 2]]"),
                ({"parts": [[[0, 1, 2]]]}, "within 3 tokens, got [[0, 1, 2]]"),
                ({"parts": [[0, 1]]}, "within 3 tokens, got [0, 1]"),
                ({"parts": [[[0.0, 1]]]}, "within 3 tokens, got [[0.0, 1]]"),
                ({"parts": [7]}, "within 3 tokens, got 7"),
                ({"parts": 7}, "'parts' must be"),
            )
        ),
        (protocol.WRITE, {"prompts": [], "seconds": 1}, "'stop' must be"),
        (
            protocol.WRITE,
            {"prompts": [{"input_ids": [1], "seed": 0}], "seconds": 1, "stop": [], "max_new_tokens": 2.5,
             "temperature": 0},
            "'max_new_tokens' must be",
        ),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(served: Served, path: str, message: dict[str, Any], complaint: str) -> None:
    status, answer = served.ask(path, **message)
    assert status == 400
    assert complaint in answer["error"]
    assert not served.runner.asked


def test_what_is_no_json(served: Served) -> None:
    status, answer = served.post(protocol.HELLO, b"{not json")
    assert status == 400
    assert answer["error"].startswith("not a message of this protocol")


def test_hello(served: Served, writing: Served) -> None:
    """Who it is, and everything by which a client can tell that it is the right one."""
    assert served.store is not None
    status, facts = served.ask(protocol.HELLO)
    assert status == 200
    session = facts.pop("session")
    assert facts == {
        "protocol": protocol.PROTOCOL, "engine": "tiny", "engine_version": "1.2", "layers": 6, "hidden_size": 4,
        "itemsize": 4,
        "context": 64, "vocab_size": 100, "norm_state": "pre_norm", "target": "/targets/tiny", "taps": [1, 3],
        "serial": False, "no_images": "its worker was not made for them",
        "draft": None, "draft_length": 0, "store_bytes": CAPACITY,
        "delivery": {"kind": "shared", "root": str(served.store.root)},
    }  # fmt: skip
    other = writing.ask(protocol.HELLO)[1]
    assert (other["delivery"], other["taps"]) == (None, [])
    assert other["session"] != session


def test_good_refused_and_short_samples_of_one_capture(served: Served) -> None:
    """Each is answered in its place; of those without a record nothing stays in the store."""
    assert served.store is not None
    status, answer = served.capture([1, 2, 3], [REFUSED, 1], [5, SHORT], [7])
    assert status == 200
    first, refused, short, last = answer["results"]
    assert refused == {"id": "s1", "reason": "hidden states that are not finite"}
    assert short == {"id": "s2", "reason": "1 tokens were captured of 2"}
    for result, ids in ((first, [1, 2, 3]), (last, [7])):
        ref = RecordRef(record_id=result["id"], length=len(ids), checksum=result["checksum"])
        assert result == {"id": ref.record_id, "length": ref.length, "checksum": ref.checksum}
        assert served.store.get(ref).input_ids_T.tolist() == ids
        served.store.remove(ref)
    assert served.store.usage().records == 0


def part_of_sample(part: int, ids: list[int], name: str = "shared-0") -> dict[str, Any]:
    """Of a sample that two callers share."""
    return {"id": name, "input_ids": ids, "parts": [[[0, 2], [3, 4]], [[2, len(ids)]]], "part": part}


def taken(store: SharedMemoryStore, result: dict[str, Any]) -> Features:
    """What an answer refers to, out of the store."""
    ref = RecordRef(record_id=result["id"], length=result["length"], checksum=result["checksum"])
    found = store.get(ref)
    store.remove(ref)
    return found


@pytest.mark.parametrize("landing", ["where callers take it from", "in the engine's process"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_callers_of_parts_share_one_capture(served: Served, landing: str, order: tuple[int, int]) -> None:
    """Each takes the rows that it asked for, and when both have nothing is left of the whole."""
    assert served.store is not None
    if landing == "in the engine's process":
        own = MemoryStore()
        served.runner.store = served.worker.landing = served.worker.captures._landing = own  # type: ignore[assignment]
    ids = [10, 11, 12, 13, 14]
    whole, rows = features(ids), {0: [0, 1, 3], 1: [2, 3, 4]}
    for number, part in enumerate(order):
        status, answer = served.ask(protocol.CAPTURE, samples=[part_of_sample(part, ids)], seconds=5)
        assert status == 200
        (result,) = answer["results"]
        held = {RecordRef(record_id=result["id"], length=3, checksum=result["checksum"]): rows[part]}
        for ref, wanted in held.items():
            got = served.store.get(ref)
            assert got.input_ids_T.tolist() == [ids[row] for row in wanted]
            assert torch.equal(got.taps_TNH, whole.taps_TNH[wanted])
            assert torch.equal(got.last_TH, whole.last_TH[wanted])
            served.store.remove(ref)
        whole_left = 1 - number
        assert len(served.runner.captured) == 1
        assert served.store.usage().records + (len(own) if landing == "in the engine's process" else 0) == whole_left


def test_callers_who_ask_at_the_same_time(served: Served) -> None:
    """While the engine is at it; samples without parts between them."""
    assert served.store is not None
    ids = [STUCK, 11, 12, 13, 14]
    answers: dict[int, tuple[int, dict[str, Any]]] = {}

    def call(part: int) -> None:
        samples = [{"id": f"own-{part}", "input_ids": [7, part]}, part_of_sample(part, ids)]
        answers[part] = served.ask(protocol.CAPTURE, samples=samples, seconds=10)

    callers = [threading.Thread(target=call, args=(part,)) for part in (0, 1)]
    for caller in callers:
        caller.start()
    deadline = time.monotonic() + 5
    while len(served.runner.captured) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    served.runner.let_go.set()
    for caller in callers:
        caller.join(10)
    assert sorted(served.runner.captured) == ["own-0", "own-1", "shared-0"]
    for part, rows in ((0, [0, 1, 3]), (1, [2, 3, 4])):
        own, shared = answers[part][1]["results"]
        assert taken(served.store, own).input_ids_T.tolist() == [7, part]
        assert taken(served.store, shared).input_ids_T.tolist() == [ids[row] for row in rows]
    assert served.store.usage().records == 0


def test_what_cannot_be_captured_is_said_to_both_and_tried_again_under_another_name(served: Served) -> None:
    ids = [REFUSED, 11, 12, 13]
    for attempt in range(2):
        for part in (0, 1):
            sample = part_of_sample(part, ids, f"shared-{attempt}")
            _, answer = served.ask(protocol.CAPTURE, samples=[sample], seconds=5)
            assert answer["results"] == [{"id": f"shared-{attempt}", "reason": "hidden states that are not finite"}]


def test_only_a_callers_own_rows_need_room(served: Served) -> None:
    """What all the callers take together would not fit at once."""
    assert served.store is not None
    length = MOST * 8 // 10
    half = length // 2
    sample = {"id": "long", "input_ids": [1] * length, "parts": [[[0, half]], [[half, length]]]}
    own = MemoryStore()
    served.runner.store = served.worker.landing = served.worker.captures._landing = own  # type: ignore[assignment]
    for part, rows in ((0, half), (1, length - half)):
        status, answer = served.ask(protocol.CAPTURE, samples=[{**sample, "part": part}], seconds=1)
        assert status == 200
        assert answer["results"][0]["length"] == rows
    status, answer = served.ask(protocol.CAPTURE, samples=[{**sample, "id": "more", "part": 0}], seconds=0.1)
    assert status == 507


def test_an_engine_that_does_not_come_back(served: Served) -> None:
    """The whole request is 504, by the deadline that the client gave."""
    started = time.monotonic()
    status, answer = served.capture([STUCK], [1], seconds=0.3)
    assert status == 504
    assert "did not finish in the time given" in answer["error"]
    assert 0.25 < time.monotonic() - started < 3
    prompt = {"input_ids": [STUCK], "seed": 0}
    status, _ = served.ask(
        protocol.WRITE, prompts=[prompt], seconds=0.1, stop=[], max_new_tokens=4, temperature=0.0
    )  # fmt: skip
    assert status == 504


def test_an_engine_that_fails_in_a_way_of_its_own(served: Served) -> None:
    assert served.capture([BROKEN]) == (500, {"error": "ZeroDivisionError: oh"})
    assert served.capture([1])[0] == 200, "and goes on"


def test_a_full_store_is_said_when_the_time_is_up_and_ends_when_a_record_is_taken(served: Served) -> None:
    assert served.store is not None
    most = [1] * (MOST * 8 // 10)
    assert served.capture(most)[0] == 200
    status, answer = served.capture(most, seconds=0.2)
    assert status == 507
    assert "wait in the store to be taken" in answer["error"]
    status, answer = served.capture([1] * (MOST + 1))
    assert status == 507
    assert "raise engine.store_mb" in answer["error"]
    served.store.remove(served.store.find("s0"))
    assert served.capture(most)[0] == 200


def test_a_worker_without_layers_captures_nothing(writing: Served) -> None:
    status, answer = writing.capture([1])
    assert status == 400
    assert "started without layers to capture" in answer["error"]


def test_text(writing: Served) -> None:
    prompts = [{"input_ids": [1, 5], "seed": 11}, {"input_ids": [8], "seed": 12}]
    status, answer = writing.ask(
        protocol.WRITE, prompts=prompts, seconds=5, stop=[2, 3], max_new_tokens=7, temperature=1
    )
    assert status == 200
    assert answer["results"] == [
        {"tokens": [6], "accepted": [1, 0], "rounds": 2, "accepted_tokens": 1},
        {"tokens": [9], "accepted": [1, 0], "rounds": 2, "accepted_tokens": 1},
    ]
    assert [(list(each.input_ids), each.seed) for each in writing.runner.asked] == [([1, 5], 11), ([8], 12)]
    for each in writing.runner.asked:
        assert (list(each.stop), each.max_new_tokens, each.temperature) == ([2, 3], 7, 1.0)


def test_text_with_a_draft(writing: Served) -> None:
    """What all texts of the request share."""
    prompts = [{"input_ids": [1, 5], "seed": 11}, {"input_ids": [8], "seed": 12}]
    told = {"prompts": prompts, "seconds": 5, "stop": [], "max_new_tokens": 7, "temperature": 0, "seed": 9}
    status, _ = writing.ask(protocol.WRITE, **told, source={"directory": "/run/pushed", "length": 3})
    assert status == 200
    source = DraftSource(directory=Path("/run/pushed"), length=3)
    assert [(each.common_seed, each.source) for each in writing.runner.asked] == [(9, source)] * 2
    for wrong in ({"directory": "/run/pushed"}, {"directory": "/run/pushed", "length": 0}, "/run/pushed"):
        assert writing.ask(protocol.WRITE, **told, source=wrong)[0] == 400


def test_counters(writing: Served) -> None:
    expected = {"rounds": 4, "drafted": 8, "accepted": 3, "per_position": [2, 1]}
    assert writing.ask(protocol.COUNTERS) == (200, expected)


def test_stop(writing: Served) -> None:
    assert writing.ask(protocol.STOP) == (200, {})
    assert writing.worker.stopping.is_set()


def test_only_posts_are_answered(writing: Served) -> None:
    connection = writing.connect()
    connection.request("GET", protocol.HELLO, headers={"Authorization": f"Bearer {TOKEN}"})
    assert connection.getresponse().status == 501
    connection.close()


def test_usage_counts_work_and_what_waits(served: Served) -> None:
    assert served.store is not None
    before = served.ask(protocol.USAGE)[1]
    assert (before["tokens"], before["busy_seconds"], before["records"]) == (0, 0, 0)
    asked = threading.Thread(target=lambda: served.capture([STUCK, 1, 2], [4, 5]))
    asked.start()
    time.sleep(0.3)
    during = served.ask(protocol.USAGE)[1]
    assert 0.2 < during["busy_seconds"] <= during["seconds"], "work that goes on counts"
    assert during["tokens"] == 2, "only what is done"
    served.runner.let_go.set()
    asked.join()
    after = served.ask(protocol.USAGE)[1]
    assert (after["tokens"], after["records"]) == (5, 2)
    assert after["nbytes"] > 0
    served.capture([REFUSED, 1])
    assert served.ask(protocol.USAGE)[1]["tokens"] == 5, "a sample that failed is no work done"
    assert served.ask(protocol.USAGE)[1]["busy_seconds"] < served.ask(protocol.USAGE)[1]["seconds"]
