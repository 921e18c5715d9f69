"""The contract of a feature store, kept by each of them; and what only those in files have to withstand."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError, StoreFullError
from torchspec.core.features import directory, shared
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.conformance import STORE_CHECKS, OpenStore, sample_features
from torchspec.core.features.directory import DirectoryStore
from torchspec.core.features.memory import MemoryStore
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.features import Features, FeatureStore


@pytest.fixture(params=["memory", "directory", "shared"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    opened: list[FeatureStore] = []

    def make() -> FeatureStore:
        store: FeatureStore = {
            "memory": MemoryStore,
            "directory": lambda: DirectoryStore(tmp_path / str(len(opened))),
            "shared": lambda: SharedMemoryStore(capacity=10_000_000),
        }[request.param]()
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_every_store_keeps_the_contract(check: Callable[[OpenStore], None], open_store: OpenStore) -> None:
    check(open_store)


class Forgetful(MemoryStore):
    """Gives out the newest record under any id."""

    def get(self, ref: object) -> Features:
        return list(self._open.values())[-1]


class Replacing(MemoryStore):
    """As Mooncake's `put` would, were it not guarded: an id that is there is no error."""

    def put(self, record_id: str, features: Features):  # type: ignore[no-untyped-def]
        self._open.pop(record_id, None)
        return super().put(record_id, features)


class Rounding(MemoryStore):
    """Keeps everything in half the bytes."""

    def get(self, ref):  # type: ignore[no-untyped-def]
        features = super().get(ref)
        return replace(features, last_TH=features.last_TH.bfloat16().to(features.last_TH.dtype))


@pytest.mark.parametrize("store", [Forgetful, Replacing, Rounding])
def test_the_contract_finds_a_store_that_breaks_it(store: type[MemoryStore]) -> None:
    broken = []
    for check in STORE_CHECKS:
        try:
            check(store)
        except AssertionError as error:
            broken.append((check.__name__, str(error)))
    assert broken


@pytest.mark.parametrize("place", ["taps", "last"])
def test_a_flipped_bit_is_found(tmp_path: Path, place: str) -> None:
    store, features = DirectoryStore(tmp_path), sample_features(50)
    ref = store.put("sample", features)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    tensor = features.taps_TNH if place == "taps" else features.last_TH
    start = data.find(tensor.numpy().tobytes())
    assert start > 0
    data[start + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedRecordError, match=f"'sample' in {path} changed since it was written"):
        store.get(ref)


def test_a_record_of_an_earlier_attempt_is_not_taken_for_this_one(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    earlier = store.put("sample", sample_features(seed=1))
    store.remove(earlier)
    store.put("sample", sample_features(seed=2))
    with pytest.raises(DamagedRecordError, match="another one than its reference promises"):
        store.get(earlier)


def test_a_file_cut_short_is_damaged(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    ref = store.put("sample", sample_features(50))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedRecordError, match=r"'sample' in .* cannot be read"):
        store.get(ref)


def test_a_foreign_safetensors_file_is_damaged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    store = DirectoryStore(tmp_path)
    ref = store.put("sample", sample_features(50))
    (path,) = tmp_path.iterdir()
    save_file({"last": torch.ones(3)}, path)
    with pytest.raises(DamagedRecordError, match=r"'sample' in .* cannot be read"):
        store.get(ref)


def test_rows_are_told_apart() -> None:
    """Rows exchanged, and one hidden state moved from the taps to the last rows' place, change the checksum."""
    features = sample_features(6, hidden=7)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    swapped = replace(features, taps_TNH=features.taps_TNH[order], last_TH=features.last_TH[order])
    assert torch.equal(row_sums(swapped), row_sums(features)[order])
    assert checksum(swapped, row_sums(swapped)) != checksum(features, row_sums(features))
    other = replace(features, norm_state="post_norm")
    assert checksum(other, row_sums(other)) != checksum(features, row_sums(features))


@pytest.mark.parametrize("hidden", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_sums_are_sums_of_the_rows_bytes(hidden: int, dtype: torch.dtype) -> None:
    features = sample_features(4, hidden=hidden, dtype=dtype)
    expected = []
    for row in range(4):
        total = 0
        for tensor in (features.taps_TNH.flatten(1), features.last_TH):
            data = bytes(tensor[row].contiguous().view(torch.uint8).tolist())
            width = next(size for size in (8, 4, 2, 1) if len(data) % size == 0)
            pieces = range(0, len(data), width)
            total += sum(int.from_bytes(data[at : at + width], sys.byteorder, signed=True) for at in pieces)
        expected.append((total + 2**63) % 2**64 - 2**63)
    assert row_sums(features).tolist() == expected


def test_a_full_store_names_sizes_and_keeps_nothing(tmp_path: Path) -> None:
    features = sample_features(1000, hidden=64)
    store = DirectoryStore(tmp_path, capacity=1_500_000)
    store.put("first", features)
    with pytest.raises(StoreFullError, match=r"'second' takes 1\.0 MB, and the feature store .* holds 1\.0 MB"):
        store.put("second", features)
    assert store.usage().records == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a record")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory, "save_tensors", full)
    store = DirectoryStore(tmp_path)
    with pytest.raises(StoreFullError, match="no room for record 'sample'"):
        store.put("sample", sample_features())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_hold_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureStoreError, match="cannot be made"):
        DirectoryStore(tmp_path / "file")


_WRITER = """
import sys
from pathlib import Path
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.shared import SharedMemoryStore
ref = SharedMemoryStore(root=Path(sys.argv[1])).put("from afar", sample_features(7, seed=4))
print(ref.checksum)
"""


def test_another_process_writes_what_this_one_reads() -> None:
    store = SharedMemoryStore(capacity=1_000_000)
    try:
        assert oct(store.root.stat().st_mode)[-3:] == "700", "other users could read it"
        done = subprocess.run(
            [sys.executable, "-P", "-c", _WRITER, str(store.root)], capture_output=True, text=True, check=True
        )
        from torchspec.core.interfaces.features import RecordRef

        ref = RecordRef(record_id="from afar", length=7, checksum=done.stdout.strip())
        assert torch.equal(store.get(ref).taps_TNH, sample_features(7, seed=4).taps_TNH)
    finally:
        store.close()
    assert not store.root.exists()
    with pytest.raises(FeatureStoreError, match="the process that owns it has ended"):
        SharedMemoryStore(root=store.root)


def test_what_a_killed_owner_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "memory_directory", lambda: tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f"torchspec-features-{os.getuid()}-{ended.pid}-abcdefgh"
    lives = tmp_path / f"torchspec-features-{os.getuid()}-{os.getppid()}-abcdefgh"
    for path in (left, lives):
        path.mkdir()
        (path / "record").write_text("")
    store = SharedMemoryStore(capacity=1000)
    assert not left.exists()
    assert lives.exists()
    store.close()


def test_more_than_the_machine_has_is_refused_at_once() -> None:
    with pytest.raises(FeatureStoreError, match=r"engine\.store_mb"):
        SharedMemoryStore(capacity=10**18)


def test_missing_names_the_store(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    ref = store.put("sample", sample_features())
    store.remove(ref)
    with pytest.raises(MissingRecordError, match=str(tmp_path)):
        store.get(ref)
