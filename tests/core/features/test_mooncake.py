"""The Mooncake store against a real master, with other processes that write, die and spoil."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from torchspec.core.errors import (
    DamagedRecordError,
    FeatureStoreError,
    MissingRecordError,
    StoreFullError,
    StoreLostError,
    TorchspecError,
)
from torchspec.core.features import mooncake_read, registered
from torchspec.core.features.conformance import STORE_CHECKS, OpenStore, sample_features
from torchspec.core.features.mooncake import MooncakeSettings, MooncakeStore
from torchspec.core.features.registered import Regions
from torchspec.core.interfaces.features import Features, RecordRef
from torchspec.core.pipeline.mooncake_master import MooncakeMaster

pytest.importorskip("mooncake.store", exc_type=ImportError, reason='pip install "torchspec[mooncake]"')

SEGMENT = 32 << 20
TIMEOUT = 3.0


def fitted(settings: MooncakeSettings, segment: int = 0) -> MooncakeSettings:
    return replace(settings, segment_bytes=segment, buffer_bytes=8 << 20, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeMaster]:
    with MooncakeMaster(tmp_path_factory.mktemp("master")) as started:
        yield started


def close(*stores: MooncakeStore) -> None:
    with ThreadPoolExecutor() as closing:
        list(closing.map(MooncakeStore.close, stores))


@pytest.fixture(scope="module")
def idle() -> Iterator[list[MooncakeStore]]:
    """Stores that hold nothing. One is lent to test after test, for joining and leaving take a second each."""
    stores: list[MooncakeStore] = []
    yield stores
    close(*stores)


@pytest.fixture
def open_store(
    master: MooncakeMaster, idle: list[MooncakeStore], request: pytest.FixtureRequest
) -> Iterator[OpenStore]:
    lent: list[MooncakeStore] = []

    def make() -> MooncakeStore:
        name = f"{request.node.name}-{len(lent)}"
        lent.append(idle.pop() if idle else MooncakeStore(fitted(master.settings, SEGMENT), name))
        return lent[-1]

    yield make
    for store in lent:
        with suppress(RuntimeError):  # one that was closed is of no use to others
            store.remove_all()
            idle.append(store)


WRITER = """
import json, sys
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.mooncake import MooncakeSettings, MooncakeStore
store = MooncakeStore(MooncakeSettings(**json.loads(sys.argv[1])), sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    verb, name, length = line.split()
    if verb == "reconnect":
        store.reconnect()
        print(json.dumps(None), flush=True)
    else:
        ref = store.put(name, sample_features(int(length), hidden=64, seed=len(name)))
        print(json.dumps([ref.record_id, ref.length, ref.checksum]), flush=True)
store.close()
"""


class Writer:
    """A process that puts `sample_features(length, hidden=64, seed=len(name))`."""

    def __init__(self, settings: MooncakeSettings, namespace: str) -> None:
        command = [sys.executable, "-P", "-c", WRITER, json.dumps(asdict(settings)), namespace]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ready = False

    def put(self, name: str, length: int = 50) -> RecordRef:
        record_id, length, checksum = json.loads(self._ask(f"put {name} {length}"))
        return RecordRef(record_id=record_id, length=length, checksum=checksum)

    def reconnect(self) -> None:
        assert self._ask("reconnect - 0") == "null"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        if not self._ready:
            self._ready = self._answer() == "ready"
            assert self._ready
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module", autouse=True)
def writers(master: MooncakeMaster) -> Iterator[dict[str, Writer]]:
    """They start while other tests run: one that lives through all, with names of its own for each test, and two whose
    end is a test."""
    started = {name: Writer(fitted(master.settings, SEGMENT), name) for name in ("shared", "dies", "hangs")}
    yield started
    for each in started.values():
        each.kill()


@pytest.fixture(scope="module")
def reader(master: MooncakeMaster) -> Iterator[MooncakeStore]:
    """It only reads."""
    store = MooncakeStore(fitted(master.settings), "shared")
    yield store
    store.close()


@pytest.fixture
def writer(writers: dict[str, Writer]) -> Writer:
    return writers["shared"]


def within(seconds: float, kind: type[TorchspecError], named: str, work: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(kind, match=named):
        work()
    assert time.monotonic() - start < seconds


def same(got: Features, put: Features) -> bool:
    return all(getattr(got, name).equal(getattr(put, name)) for name in ("input_ids_T", "taps_TNH", "last_TH"))


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[OpenStore], None], open_store: OpenStore) -> None:
    check(open_store)


def test_another_process_writes_what_this_one_reads_and_removes(
    writer: Writer, reader: MooncakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks; memory of earlier readings is used again, but never under features that are still in use."""
    monkeypatch.setattr(mooncake_read, "_CHUNK_BYTES", 1 << 20)
    store = reader
    refs = [writer.put(name, 6000) for name in ("a", "bb", "ccc")]
    assert store.find("bb") == refs[1]
    kept = [store.get(ref) for ref in refs]
    assert all(same(got, sample_features(6000, hidden=64, seed=number + 1)) for number, got in enumerate(kept))
    address = kept.pop().taps_TNH.data_ptr()
    assert store.get(refs[2]).taps_TNH.data_ptr() == address
    store.remove(refs[0])
    within(2, MissingRecordError, "'a'", lambda: store.get(refs[0]))
    again = writer.put("a", 30)
    within(2, DamagedRecordError, "30 tokens, its reference promises 6000", lambda: store.get(refs[0]))
    stale = replace(again, checksum=refs[0].checksum)
    within(2, DamagedRecordError, "another one than its reference promises", lambda: store.get(stale))
    assert same(kept[0], sample_features(6000, hidden=64, seed=1))
    for ref in (again, *refs[1:]):
        store.remove(ref)


def test_one_missing_record_costs_no_other(open_store: OpenStore) -> None:
    store = open_store()
    assert isinstance(store, MooncakeStore)
    features = [sample_features(seed=number) for number in range(3)]
    refs = store.put_many([(str(number), each) for number, each in enumerate(features)])
    store.remove(refs[1])
    first, missing, last = store.get_many(refs)
    assert isinstance(missing, MissingRecordError)
    assert isinstance(first, Features)
    assert isinstance(last, Features)
    assert same(first, features[0])
    assert same(last, features[2])
    with pytest.raises(ValueError, match="'0' is already stored"):
        store.put_many([("new", features[0]), ("0", features[1])])
    assert store.usage().records == 2
    store.put("new", features[0])
    store.remove_all()
    assert store.usage().records == store.usage().nbytes == 0


def test_runs_that_share_a_master_do_not_meet(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    ref = one.put("sample", sample_features(seed=1))
    within(2, MissingRecordError, "'sample'", lambda: other.get(ref))
    other.put("sample", sample_features(seed=2))
    other.remove_all()  # type: ignore[attr-defined]
    assert same(one.get(ref), sample_features(seed=1))


def test_a_full_store_says_so_keeps_nothing_and_can_be_filled_again(open_store: OpenStore) -> None:
    store = open_store()
    features = sample_features(3000, hidden=256)
    first = store.put("a", features)
    store.put("b", features)
    with pytest.raises(StoreFullError, match=r"'c' takes 12\.3 MB.* offers 33\.6 MB .* has put 24\.7 MB"):
        store.put("c", features)
    assert store.usage().records == 2
    store.remove(first)
    assert same(store.get(store.put("c", features)), features)


def test_writers_in_two_processes_cannot_both_have_an_id(writer: Writer, reader: MooncakeStore) -> None:
    ref = writer.put("sample")
    with pytest.raises(ValueError, match="'sample' is already stored"):
        reader.put("sample", sample_features(seed=9))
    assert same(reader.get(reader.find("sample")), sample_features(50, hidden=64, seed=6))
    reader.remove(ref)


@pytest.fixture(scope="module")
def spoil(master: MooncakeMaster) -> Iterator[Callable[[str, int], None]]:
    """Turns a bit of an object, as a client that knows nothing of records."""
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig

    settings, client, pinned = master.settings, MooncakeDistributedStore(), ReplicateConfig()
    assert client.setup(settings.hostname, settings.metadata, 16 << 20, 4 << 20, "tcp", "", settings.master) == 0
    pinned.with_hard_pin = True
    pinned.preferred_segment = client.get_hostname()

    def turn(key: str, at: int) -> None:
        data = bytearray(client.get(key))
        data[at] ^= 1
        client.remove(key, True)
        assert client.put(key, bytes(data), pinned) == 0

    yield turn
    client.close()


@pytest.mark.parametrize(
    ("part", "at", "named"),
    [
        ("body", 100, "changed since it was written"),
        ("body", -1, "changed since it was written"),
        ("head", 4096 + 8, "changed since it was written"),
        ("head", -1, "changed since it was written"),
        ("head", 5, "cannot be read"),
    ],
)
def test_a_turned_bit_is_found(
    writer: Writer, reader: MooncakeStore, part: str, at: int, named: str, spoil: Callable[[str, int], None]
) -> None:
    ref = writer.put("turned")
    assert reader.get(ref)
    spoil(f"{reader._link.name('turned')}/{part}", at)
    within(2, DamagedRecordError, named, lambda: reader.get(ref))
    reader.remove(ref)


def test_a_writer_that_died_is_noticed_in_time(writers: dict[str, Writer], master: MooncakeMaster) -> None:
    store = MooncakeStore(fitted(master.settings), "dies")
    ref = writers["dies"].put("sample", 2000)
    assert store.get(ref)
    writers["dies"].kill()
    within(
        TIMEOUT + 1, StoreLostError, "'sample' cannot be transferred: the process that holds it", lambda: store.get(ref)
    )
    store.close()


def test_a_writer_that_hangs_is_noticed_in_time(writers: dict[str, Writer], master: MooncakeMaster) -> None:
    store = MooncakeStore(fitted(master.settings), "hangs")
    ref = writers["hangs"].put("sample", 2000)
    assert store.get(ref)
    writers["hangs"].process.send_signal(signal.SIGSTOP)
    within(TIMEOUT + 2, StoreLostError, "'sample' cannot be transferred", lambda: store.get(ref))
    store.close()


def test_a_killed_master_is_noticed_in_time_and_its_successor_used(tmp_path: Path) -> None:
    with MooncakeMaster(tmp_path) as master:
        writer = Writer(fitted(master.settings, SEGMENT), "run")
        store = MooncakeStore(fitted(master.settings), "run")
        own = MooncakeStore(fitted(master.settings, SEGMENT), "run")
        old, mine = writer.put("old"), own.put("mine", sample_features())
        assert store.get(old)
        first = master.pid
        os.kill(first, signal.SIGSTOP)
        within(TIMEOUT + 1, StoreLostError, "does not answer", lambda: store.get(old))
        os.kill(first, signal.SIGKILL)
        within(6, StoreLostError, "does not answer|started again", lambda: store.get(old))
        while master.pid == first:
            time.sleep(0.05)
        store.reconnect()
        own.reconnect()
        writer.reconnect()
        within(2, MissingRecordError, "'old'", lambda: store.get(old))
        assert same(store.get(writer.put("old")), sample_features(50, hidden=64, seed=3))
        own.put("mine", sample_features(seed=4))
        assert own.usage().records == 1
        os.kill(master.pid, signal.SIGKILL)
        second = master.pid
        while master.pid == second:
            time.sleep(0.05)
        # Nobody noticed; the successor knows nothing of what was there.
        deadline = time.monotonic() + 15
        while True:
            try:
                own.put("later", sample_features())
            except StoreLostError as error:
                if "was started again" in str(error):
                    break
            assert time.monotonic() < deadline
        store.get_many([old])  # may still find the connection broken
        within(6, StoreLostError, "'old' is lost.*was started again", lambda: store.get(old))
        assert mine.record_id == "mine"
        writer.kill()
        close(store, own)
    start = time.monotonic()
    with pytest.raises(StoreLostError, match="no Mooncake master answers at 127"):
        MooncakeStore(fitted(master.settings), "run")
    assert time.monotonic() - start < TIMEOUT


def test_closing_waits_for_those_inside(writer: Writer, master: MooncakeMaster) -> None:
    """The library would crash the process."""
    store = MooncakeStore(fitted(master.settings), "shared")
    ref = writer.put("inside", 6000)
    ends: list[Exception] = []

    def read() -> None:
        try:
            while True:
                assert store.get(ref).last_TH.shape == (6000, 64)
        except (RuntimeError, FeatureStoreError) as error:
            ends.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    store.close()
    for thread in threads:
        thread.join(10)
    assert [str(error) for error in ends] == [f"the feature store {store.namespace} is closed"] * 3


def test_views_and_other_layouts_are_written_as_they_read(open_store: OpenStore) -> None:
    store = open_store()
    whole = sample_features(40, hidden=16)
    turned = replace(whole, taps_TNH=whole.taps_TNH.transpose(0, 1).contiguous().transpose(0, 1))
    assert not turned.taps_TNH.is_contiguous()
    assert same(store.get(store.put("turned", turned)), whole)


def test_regions_are_used_again_bounded_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[int, int] = {}
    regions = Regions(known.__setitem__, known.pop, keep_bytes=3 << 20)
    leases = [regions.lease(1 << 20) for _ in range(5)]
    view = leases[0][10:20].view(torch.int16)
    first = leases[0].data_ptr()
    assert len({lease.data_ptr() for lease in leases}) == len(known) == 5
    del leases
    assert regions.idle_bytes() == 3 << 20
    assert len(known) == 4, "one is in use, three are kept"
    assert all(regions.lease(1 << 20).data_ptr() != first for _ in range(4))
    del view
    assert regions.idle_bytes() == 3 << 20
    assert regions.lease(64).nbytes == 64
    monkeypatch.setattr(registered, "IDLE_SECONDS", -1.0)
    assert regions.idle_bytes() == 0
    assert known == {}
