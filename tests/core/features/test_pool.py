"""Features handed over through buffers that are used again and again, between real processes."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError, StoreFullError
from torchspec.core.features import shared
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.conformance import STORE_CHECKS, OpenStore, sample_features
from torchspec.core.features.pool import PooledStore, record_bytes
from torchspec.core.features.pool_holds import Reader
from torchspec.core.interfaces.features import Features, RecordRef
from torchspec.devices.cpu.ipc import CpuSharedMemory

KIB = 1 << 10


class Copying(CpuSharedMemory):
    """As an accelerator's: readers copy and let go."""

    reads_in_place = False


@pytest.fixture(params=[CpuSharedMemory, Copying])
def open_store(request: pytest.FixtureRequest) -> Iterator[OpenStore]:
    opened: list[PooledStore] = []

    def make() -> PooledStore:
        opened.append(PooledStore(request.param(), capacity=10_000_000))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
        assert not store.root.exists()


@pytest.fixture
def pool() -> Iterator[PooledStore]:
    store = PooledStore(CpuSharedMemory(), capacity=512 * KIB)
    yield store
    store.close()


def of_size(nbytes: int, seed: int = 0) -> Features:
    """A record that takes about so many bytes: 1 KiB a token."""
    return sample_features(max(1, nbytes // KIB), taps=(1, 3, 5), hidden=64, seed=seed)


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_a_pool_keeps_the_contract(check: Callable[[OpenStore], None], open_store: OpenStore) -> None:
    check(open_store)


SUMMED = [number * 699 // 15 for number in range(16)]
"""Of 700 rows."""


@pytest.mark.parametrize("hidden", [4, 7, 1024])
def test_sums_are_those_of_sixteen_rows(hidden: int) -> None:
    """The checksum is that of features.checksums over them, for odd widths and strided features."""
    features = sample_features(700, hidden=hidden, dtype=torch.bfloat16)
    strided = replace(features, last_TH=features.last_TH.repeat(1, 2)[:, :hidden], taps_TNH=features.taps_TNH.flip(1))
    store = PooledStore(CpuSharedMemory(), capacity=20_000_000)
    for number, given in enumerate((features, strided)):
        ref = store.put(str(number), given)
        assert ref.checksum == checksum(given, row_sums(given)[SUMMED])
        assert torch.equal(store.get(ref).last_TH, given.last_TH)
    store.close()


def test_a_buffer_in_use_is_not_written(pool: PooledStore) -> None:
    """One tensor of a record, even a part of one, keeps its buffer; then it is used again, and no more is taken."""
    ref = pool.put("first", of_size(100 * KIB, seed=1))
    part = pool.get(ref).taps_TNH[3:5, 1]
    pool.remove(ref)
    for number in range(20):
        other = pool.put(f"other {number}", of_size(100 * KIB, seed=2))
        pool.remove(other)
        assert pool.allocated <= 2 * 128 * KIB
    gc.collect()
    assert torch.equal(part, of_size(100 * KIB, seed=1).taps_TNH[3:5, 1])
    held = pool.allocated
    del part
    refs = [pool.put(f"last {number}", of_size(100 * KIB)) for number in range(2)]
    assert pool.allocated == held
    assert len(refs) == pool.usage().records


def test_an_id_used_again_while_its_first_record_is_held_gives_both_buffers_back(pool: PooledStore) -> None:
    first = pool.put("same", of_size(100 * KIB, seed=1))
    got = pool.get(first)
    pool.remove(first)
    second = pool.put("same", of_size(100 * KIB, seed=2))
    del got
    pool.put("third", of_size(100 * KIB))
    assert pool.allocated <= 2 * 128 * KIB, "the first record's buffer did not come back"
    with pytest.raises(DamagedRecordError, match="another one than its reference promises"):
        pool.get(first)
    assert torch.equal(pool.get(second).last_TH, of_size(100 * KIB, seed=2).last_TH)


def test_capacity_holds_for_any_sizes_and_free_buffers_make_room() -> None:
    choose = random.Random(3)
    store = PooledStore(CpuSharedMemory(), capacity=1024 * KIB)
    live: dict[RecordRef, tuple[Features, Features | None]] = {}
    full = 0
    for number in range(400):
        features = of_size(choose.randrange(1, 400) * KIB, seed=number)
        try:
            ref = store.put(str(number), features)
            live[ref] = (features, store.get(ref) if choose.random() < 0.5 else None)
        except StoreFullError:
            full += 1
            assert live, "an empty store has room for any record below its capacity"
        on_disk = sum(path.stat().st_blocks * 512 for path in store.root.glob("*.memory"))
        assert max(store.allocated, on_disk) <= 1024 * KIB
        while live and (len(live) > 6 or choose.random() < 0.4):
            ref = choose.choice(list(live))
            features, got = live.pop(ref)
            assert torch.equal((got or store.get(ref)).taps_TNH, features.taps_TNH)
            store.remove(ref)
    assert full > 10
    live.clear()
    got = None
    store.put("as large as the whole", of_size(1023 * KIB))
    store.close()


def test_a_full_pool_names_the_record_and_keeps_nothing(pool: PooledStore) -> None:
    pool.put("first", of_size(300 * KIB))
    with pytest.raises(StoreFullError, match=r"'second': no room .* of the 0\.5 MB it may hold are in use"):
        pool.put("second", of_size(300 * KIB))
    with pytest.raises(StoreFullError, match=r"'third': a record of .* is more than"):
        pool.put("third", of_size(600 * KIB))
    assert pool.usage().records == 1
    assert not list(pool.root.glob("*.aside"))


def test_waiting_for_room(pool: PooledStore) -> None:
    features = of_size(300 * KIB)
    pool.wait_for_room(record_bytes(features), time.monotonic())
    pool.put("first", features)
    with pytest.raises(StoreFullError, match="not taken out in time"):
        pool.wait_for_room(record_bytes(features), time.monotonic() + 0.05)
    with pytest.raises(StoreFullError, match="is more than"):
        pool.wait_for_room(600 * KIB, time.monotonic() + 100)


def test_two_thousand_records_grow_nothing(pool: PooledStore) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    features = sample_features(8)
    before, files = 0, 0
    for number in range(2000):
        ref = pool.put(str(number), features)
        got = pool.get(ref)
        pool.remove(ref)
        del got
        if number == 200:
            before, files = resident(), len(os.listdir("/proc/self/fd"))
    assert resident() - before < 4 << 20
    assert len(os.listdir("/proc/self/fd")) <= files
    assert pool.allocated == 64 * KIB
    assert not os.listdir(pool.root / "marks")


def _file(pool: PooledStore) -> Path:
    (path,) = (pool.root / "records").iterdir()
    return path


def test_a_torn_file_is_damaged_and_can_be_removed(pool: PooledStore) -> None:
    ref = pool.put("sample", of_size(10 * KIB))
    whole = _file(pool).read_bytes()
    for length in (0, 30, len(whole) - 1):
        _file(pool).write_bytes(whole[:length])
        with pytest.raises(DamagedRecordError, match=r"'sample' in .* cannot be read"):
            pool.get(ref)
    pool.remove(ref)
    pool.put("sample", of_size(10 * KIB))
    assert pool.allocated == 64 * KIB, "the torn record's buffer was not used again"
    assert not os.listdir(pool.root / "marks")


@pytest.mark.parametrize("fact", ["generation", "handle", "shape", "dtype", "checksum", "norm_state", "tap_layers"])
def test_no_changed_fact_is_believed(pool: PooledStore, fact: str) -> None:
    ref = pool.put("sample", of_size(10 * KIB))
    line, _, rest = _file(pool).read_bytes().partition(b"\n")
    facts = json.loads(line)
    facts[fact] = {
        "generation": 99,
        "handle": facts["handle"] + "x",
        "shape": [10, 3, 32],
        "dtype": "torch.float16",
        "checksum": "0" * 32,
        "norm_state": "post_norm",
        "tap_layers": [1, 3, 6],
    }[fact]
    _file(pool).write_bytes(json.dumps(facts).encode() + b"\n" + rest)
    with pytest.raises(DamagedRecordError, match="'sample'"):
        pool.get(ref)


@pytest.mark.parametrize("row", [0, 99])
def test_changed_content_of_the_first_and_the_last_row_is_found(pool: PooledStore, row: int) -> None:
    ref = pool.put("sample", of_size(100 * KIB))
    pool.get(ref).last_TH[row, 5] += 1
    with pytest.raises(DamagedRecordError, match=r"'sample' in .* changed since it was written"):
        pool.get(ref)


def test_a_buffer_used_for_another_record_is_never_given_out(pool: PooledStore) -> None:
    """Were a buffer reused too early, its generation would tell, even with the same content."""
    ref = pool.put("stale", of_size(100 * KIB))
    kept = _file(pool).read_bytes()
    pool.remove(ref)
    pool.put("new", of_size(100 * KIB))
    (pool.root / "records" / "stale").write_bytes(kept)
    with pytest.raises(DamagedRecordError, match=r"'stale' .* is of generation 2, not 1"):
        pool.get(ref)


def test_a_record_removed_while_it_is_opened_is_missing(pool: PooledStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer may be another record's by the time that it is marked."""
    ref = pool.put("sample", of_size(100 * KIB))
    hold = Reader.hold

    def late(reader: Reader, buffer: int) -> Callable[[], None]:
        pool.remove(ref)
        return hold(reader, buffer)

    monkeypatch.setattr(Reader, "hold", late)
    with pytest.raises(MissingRecordError, match="'sample'"):
        pool.get(ref)
    assert not os.listdir(pool.root / "marks")


READER = """
import json, sys, time
from pathlib import Path
from torchspec.core.features.pool import PooledStore
from torchspec.core.features.pool_holds import Reader
from torchspec.core.interfaces.features import RecordRef
from torchspec.devices.cpu.ipc import CpuSharedMemory
store = PooledStore(CpuSharedMemory(), root=Path(sys.argv[1]))
held = []
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "drop":
        held.clear()
        print(0, flush=True)
        continue
    ref = RecordRef(**order["ref"])
    got = store.get(ref)
    store.remove(ref)
    if order["do"] == "hold":
        held.append(got)
    total = float(got.taps_TNH.double().sum() + got.last_TH.double().sum())
    del got
    print(total, flush=True)
"""

WRITER = """
import sys
from pathlib import Path
from torchspec.core.features import shared
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.pool import PooledStore
from torchspec.devices.cpu.ipc import CpuSharedMemory
shared.memory_directory = lambda: Path(sys.argv[1])
store = PooledStore(CpuSharedMemory(), capacity=10_000_000)
ref = store.put("from afar", sample_features(500, seed=4))
print(store.root, ref.checksum, flush=True)
sys.stdin.read()
"""


class Other:
    """A process that does what it is told."""

    def __init__(self, code: str, *arguments: object) -> None:
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, do: str, ref: RecordRef | None = None) -> float:
        assert self.process.stdin is not None
        order = {"do": do, "ref": None if ref is None else vars(ref)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return float(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def total(features: Features) -> float:
    return float(features.taps_TNH.double().sum() + features.last_TH.double().sum())


def test_another_process_reads_holds_and_dies(pool: PooledStore) -> None:
    assert oct(pool.root.stat().st_mode)[-3:] == "700", "other users could read it"
    reader = Other(READER, pool.root)
    try:
        for number in range(20):
            features = of_size(200 * KIB, seed=number)
            assert reader.ask("take", pool.put(str(number), features)) == pytest.approx(total(features))
        assert pool.allocated <= 256 * KIB, "what a reader let go is not used again"
        for number in range(2):
            reader.ask("hold", pool.put(f"held {number}", of_size(200 * KIB)))
        with pytest.raises(StoreFullError):
            pool.put("too much", of_size(200 * KIB))
        reader.ask("drop")
        for number in range(2):
            reader.ask("hold", pool.put(f"held again {number}", of_size(200 * KIB)))
        with pytest.raises(StoreFullError):
            pool.put("too much", of_size(200 * KIB))
        reader.process.kill()
        pool.wait_for_room(200 * KIB, time.monotonic() + 30)
        pool.put("room came back", of_size(200 * KIB))
        assert not os.listdir(pool.root / "marks")
        assert len(os.listdir(pool.root / "readers")) == 1, "the dead reader is still listed"
    finally:
        reader.end()


def test_what_a_killed_owner_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "memory_directory", lambda: tmp_path)
    writer = Other(WRITER, tmp_path)
    root, digest = writer.line().split()
    reader = PooledStore(CpuSharedMemory(), root=Path(root))
    with pytest.raises(RuntimeError, match="belongs to another process"):
        reader.put("mine", sample_features())
    ref = RecordRef(record_id="from afar", length=500, checksum=digest)
    got = reader.get(ref)
    writer.end()
    owner = PooledStore(CpuSharedMemory(), capacity=1_000_000)
    assert list(tmp_path.iterdir()) == [owner.root]
    assert torch.equal(got.taps_TNH, sample_features(500, seed=4).taps_TNH), "what was taken out is not valid any more"
    with pytest.raises(MissingRecordError):
        reader.get(ref)
    reader.close()
    owner.close()
    assert list(tmp_path.iterdir()) == []


def test_features_outlive_the_store_that_gave_them_out(pool: PooledStore) -> None:
    reader = PooledStore(CpuSharedMemory(), root=pool.root)
    ref = pool.put("sample", of_size(100 * KIB, seed=1))
    got = reader.get(ref)
    reader.remove(ref)
    reader.close()
    assert len(os.listdir(pool.root / "readers")) == 2, "were it killed now, its buffer would not come back"
    with pytest.raises(StoreFullError):  # the dead are looked for, and this reader is not one
        pool.put("too much", of_size(450 * KIB))
    for number in range(5):
        pool.remove(pool.put(str(number), of_size(300 * KIB if number % 2 else 100 * KIB)))
    assert torch.equal(got.taps_TNH, of_size(100 * KIB, seed=1).taps_TNH)
    del got, reader
    gc.collect()
    assert len(os.listdir(pool.root / "readers")) == 1


def test_pools_of_another_kind_are_refused(pool: PooledStore, tmp_path: Path) -> None:
    class Elsewhere(CpuSharedMemory):
        device_type = "toy"

    with pytest.raises(FeatureStoreError, match="lies in memory of cpu; this process reads format 2 and memory of toy"):
        PooledStore(Elsewhere(), root=pool.root)
    with pytest.raises(FeatureStoreError, match="is not a pool"):
        PooledStore(CpuSharedMemory(), root=tmp_path)
    with pytest.raises(FeatureStoreError, match="the process that owns it has ended"):
        PooledStore(CpuSharedMemory(), root=tmp_path / "gone")
    with pytest.raises(ValueError, match="either made with a capacity or opened"):
        PooledStore(CpuSharedMemory())
