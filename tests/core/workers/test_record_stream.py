"""Records that a worker sends itself, over a real connection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core.errors import DamagedRecordError, MissingRecordError, StoreLostError, TargetError
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.features import RecordRef
from torchspec.core.workers.client import WorkerClient
from torchspec.core.workers.delivery import STREAM
from torchspec.core.workers.record_stream import RecordStream
from torchspec.core.workers.runner import Facts, WorkerSettings
from torchspec.core.workers.server import Worker, make_server

TOKEN = "secret"


class Nothing:
    """An engine that is never asked."""

    facts = Facts(
        engine="none", engine_version="1", layers=6, hidden_size=8, itemsize=4, context=64, vocab_size=100,
        norm_state="pre_norm",
    )  # fmt: skip
    landing = None

    def capture(self, samples: object) -> list[Future[None]]:
        raise AssertionError

    def close(self) -> None:
        """Nothing to let go of."""


class Ends:
    """The worker's store, and a client of it."""

    def __init__(self) -> None:
        self.store = SharedMemoryStore(capacity=20_000_000)
        settings = WorkerSettings(
            target=Path("/targets/tiny"), device="cpu", dtype="float32", taps=(1,), store=self.store.root
        )
        self.worker = Worker(Nothing(), settings, self.store, streamed=True)  # type: ignore[arg-type]
        self.server = make_server(self.worker, "127.0.0.1", 0, TOKEN)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.stream = RecordStream(WorkerClient(self.url, TOKEN, name="none"))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.store.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids_T", "taps_TNH", "last_TH"))


@pytest.mark.parametrize("tokens", [1, 4000])
def test_a_record_arrives_as_it_was_put(ends: Ends, tokens: int) -> None:
    features = sample_features(tokens, hidden=128, dtype=torch.bfloat16)
    ref = ends.store.put("a.record", features)
    got = ends.stream.get(ref)
    assert equal(got, features)
    assert (got.tap_layers, got.norm_state) == (features.tap_layers, features.norm_state)
    assert ends.stream.usage().records == 1
    ends.stream.remove(ref)
    ends.stream.remove(ref)
    assert ends.stream.usage().records == 0
    assert equal(got, features)


def test_clients_are_told_so(ends: Ends) -> None:
    assert ends.worker.hello({})["delivery"] == {"kind": STREAM}


def test_what_is_not_there(ends: Ends) -> None:
    with pytest.raises(MissingRecordError, match="'gone' is not at the worker http"):
        ends.stream.get(RecordRef(record_id="gone", length=3, checksum="0"))


@pytest.mark.parametrize("name", ["../secrets", "a/b", ".hidden", ""])
def test_nothing_but_records_is_sent(ends: Ends, name: str) -> None:
    (ends.store.root.parent / "secrets").exists()
    with pytest.raises(TargetError, match="'id' must be"):
        ends.stream.get(RecordRef(record_id=name, length=3, checksum="0"))


def test_not_to_everybody(ends: Ends) -> None:
    ref = ends.store.put("mine", sample_features(3))
    other = RecordStream(WorkerClient(ends.url, "guessed", name="none"))
    with pytest.raises(TargetError, match="the token is missing or not this worker's"):
        other.get(ref)


@pytest.mark.parametrize("where", [8, -3])
def test_a_changed_byte_is_found(ends: Ends, where: int) -> None:
    """In the header, or in the rows."""
    ref = ends.store.put("sample", sample_features(50))
    file = ends.store.file("sample")
    data = bytearray(file.read_bytes())
    data[where] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(DamagedRecordError, match="'sample' in http"):
        ends.stream.get(ref)


def test_another_record_is_found_out(ends: Ends) -> None:
    ref = ends.store.put("sample", sample_features(50, seed=1))
    ends.store.remove(ref)
    ends.store.put("sample", sample_features(50, seed=2))
    with pytest.raises(DamagedRecordError, match="another one than its reference promises"):
        ends.stream.get(ref)


def test_a_worker_that_is_gone(ends: Ends) -> None:
    ref = ends.store.put("sample", sample_features(5))
    ends.server.shutdown()
    ends.server.server_close()
    with pytest.raises(StoreLostError, match="does not answer"):
        ends.stream.get(ref)


def test_a_closed_one(ends: Ends) -> None:
    ref = ends.store.put("sample", sample_features(5))
    ends.stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        ends.stream.get(ref)
