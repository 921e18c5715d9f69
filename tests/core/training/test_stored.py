"""Captured features read from a directory: the rows that were written or a hole, ahead within the budget, in parts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError, TargetError
from torchspec.core.features.directory import SUFFIX, DirectoryStore
from torchspec.core.features.manifest import Lost, Manifest, record_name
from torchspec.core.features.stored_rows import read_rows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import Rows
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.parallel.shards import Layout
from torchspec.core.training import stored
from torchspec.core.training.capturing import Documents
from torchspec.core.training.plan import Cut, Plan, Shares
from torchspec.core.training.stored import StoredFeatures, StoredFeed

LENGTHS = (5, 9, 3, 12, 7, 8, 4, 11, 6, 10, 2, 13)
PLENTY = 10**9
TOKEN_BYTES = 3 * 2 * 8  # two taps and the last states of size 2, in float64
Cell = dict[str, Any]


def written(made_up: ModuleType, directory: Path, lengths: Sequence[int] = LENGTHS, lost: Sequence[int] = ()) -> Path:
    """A finished capture of the made-up samples."""
    store = DirectoryStore(directory)
    made = [
        made_up.captured(made_up.sample(index, length).input_ids_T.tolist()) for index, length in enumerate(lengths)
    ]
    checksums = [
        None if index in lost else store.put(record_name(index), features).checksum
        for index, features in enumerate(made)
    ]
    Manifest(
        identity={}, circumstances={}, rows={"kept": len(lengths)}, norm_state="pre_norm", nbytes=store.usage().nbytes,
        checksums=tuple(checksums), lost={index: Lost(sample_id=f"row-{index}", reason="too odd") for index in lost},
    ).save(directory)  # fmt: skip
    return directory


def record(directory: Path, index: int) -> Path:
    return directory / (record_name(index) + SUFFIX)


def flip(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def place_of(path: Path, features: Features, row: int) -> int:
    """Of the first byte of a row's last hidden states within the file."""
    (begin,) = [at for at in [path.read_bytes().find(features.last_TH[row].numpy().tobytes())] if at >= 0]
    return begin


def plan_of(lengths: Sequence[int], cut: Cut) -> Plan:
    return Plan(lengths, cut, Shares(), batch_size=4, bucket_size=2, seed=0)


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Of a rank that has its sequences whole: whoever computes with the rows applies the norm, which doubles."""
    for name, value in expected.items():
        assert torch.equal(2 * found[name] if name == "last_BXH" else found[name], value), name


CUTS = [Cut(micro_batch_size=2), Cut(micro_batch_size=2, row_tokens=20)]


@pytest.mark.parametrize("cut", CUTS, ids=["padded", "packed"])
@pytest.mark.parametrize("budget", [1, 30 * TOKEN_BYTES, PLENTY])
def test_every_turn_gets_what_was_captured(
    made_up: ModuleType, context: ParallelContext, tmp_path: Path, cut: Cut, budget: int
) -> None:
    """And the records stay for the next training: two epochs, and nothing in the directory changes."""
    directory = written(made_up, tmp_path / "features", lost=(4,))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    features = StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=budget)
    plan, samples = plan_of(LENGTHS, cut), made_up.Ragged(LENGTHS)
    feed = StoredFeed(made_up.model(3), context, features)
    assert feed.whole(samples[0]).last_TH.shape == (5, 2)  # type: ignore[union-attr]
    feed.start(plan, samples, 1, 2 * plan.steps_per_epoch)
    for turn in plan.turns_from(1, 2 * plan.steps_per_epoch):
        loaded = {0: Documents.of(turn.micro_batches[0], samples, turn.some)}
        rows, holes = feed.rows(turn, loaded)
        gone = [number for number, index in enumerate(loaded[0].indices) if index == 4]
        assert holes == dict.fromkeys(gone, "not captured: too odd")
        expected = made_up.emptied(made_up.looked_up(loaded[0], rows.layout, 0, 0), [4], [4])
        assert rows.norm_state == "pre_norm"
        compare(made_up.tensors(rows), expected)
    feed.close()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("harm", ["gone", "cut short", "ids", "taps", "last", "row sums", "another's", "not a record"])
def test_a_bad_record_is_a_hole_that_says_why_and_the_others_are_used(
    made_up: ModuleType, context: ParallelContext, tmp_path: Path, harm: str
) -> None:
    directory = written(made_up, tmp_path)
    path, bad = record(directory, 3), made_up.captured(made_up.sample(3, 12).input_ids_T.tolist())
    sums = load_file(path)["row_sums"]
    tensors = {"ids": bad.input_ids_T, "taps": bad.taps_TNH, "last": bad.last_TH, "row sums": sums}
    if harm in tensors:
        flip(path, path.read_bytes().index(tensors[harm].contiguous().numpy().tobytes()) + 8)
    elif harm == "gone":
        path.unlink()
    elif harm == "another's":
        path.write_bytes(record(directory, 5).read_bytes())
    else:
        path.write_bytes(path.read_bytes()[:-1] if harm == "cut short" else b"{}")
    features = StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=PLENTY)
    plan, samples = plan_of(LENGTHS, CUTS[0]), made_up.Ragged(LENGTHS)
    feed = StoredFeed(made_up.model(0), context, features)
    feed.start(plan, samples, 0, plan.steps_per_epoch)
    why = {}
    for turn in plan.turns_from(0, plan.steps_per_epoch):
        loaded = {0: Documents.of(turn.micro_batches[0], samples, turn.some)}
        rows, holes = feed.rows(turn, loaded)
        why |= {loaded[0].indices[number]: reason for number, reason in holes.items()}
        expected = made_up.emptied(made_up.looked_up(loaded[0], rows.layout, 0, 0), [3], [3])
        compare(made_up.tensors(rows), expected)
    feed.close()
    assert list(why) == [3]
    assert "record 00000003" in why[3]
    assert str(directory) in why[3]


def test_a_record_of_other_tokens_is_not_taken_for_the_samples(made_up: ModuleType, tmp_path: Path) -> None:
    """Though it is what the manifest promises."""
    directory = written(made_up, tmp_path)
    features = StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=PLENTY)
    other = made_up.sample(7, LENGTHS[3])
    for rows in ((), ((2, 5), (7, 9))):
        assert isinstance(features.read(3, made_up.sample(3, LENGTHS[3]), rows), Features)
        found = features.read(3, other, rows)
        assert isinstance(found, Quarantined)
        assert "is of other tokens" in found.reason


def test_no_flipped_bit_of_a_record_is_read_as_features(made_up: ModuleType, tmp_path: Path) -> None:
    """Every byte of the file, header included, changed in turn: found out, or of no consequence."""
    directory = written(made_up, tmp_path, lengths=(4,))
    promised = Manifest.load(directory).checksums[0]
    assert promised is not None
    path = record(directory, 0)
    content, right = path.read_bytes(), read_rows(directory, record_name(0), promised)
    right = Features(**{**vars(right), "taps_TNH": right.taps_TNH.clone(), "last_TH": right.last_TH.clone(),
                        "input_ids_T": right.input_ids_T.clone()})  # fmt: skip
    harmless = 0
    for place in range(len(content)):
        path.unlink()  # a new file: what is mapped of the old one stays as it is
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            found = read_rows(directory, record_name(0), promised)
        except DamagedRecordError:
            continue
        harmless += 1
        assert torch.equal(found.taps_TNH, right.taps_TNH)
        assert torch.equal(found.last_TH, right.last_TH)
        assert torch.equal(found.input_ids_T, right.input_ids_T)
        assert (found.tap_layers, found.norm_state) == (right.tap_layers, right.norm_state)
    assert harmless < 100, "the header's own id and length, and blanks"


def test_a_part_needs_its_own_rows_alone(made_up: ModuleType, tmp_path: Path) -> None:
    directory = written(made_up, tmp_path)
    promised = Manifest.load(directory).checksums[3]
    assert promised is not None
    whole = made_up.captured(made_up.sample(3, 12).input_ids_T.tolist())
    flip(record(directory, 3), place_of(record(directory, 3), whole, 6))
    for rows in ([(0, 6)], [(7, 12)], [(0, 2), (9, 10)]):
        part = read_rows(directory, record_name(3), promised, rows)
        for name in ("input_ids_T", "taps_TNH", "last_TH"):
            expected = torch.cat([getattr(whole, name)[start:stop] for start, stop in rows])
            assert torch.equal(getattr(part, name), expected), name
    for rows in ([], [(6, 7)], [(0, 2), (5, 8)]):
        with pytest.raises(DamagedRecordError, match="changed since it was written"):
            read_rows(directory, record_name(3), promised, rows)
    with pytest.raises(MissingRecordError):
        read_rows(directory, record_name(99), promised)


@dataclass(frozen=True, kw_only=True)
class Gated(StoredFeatures):
    """Reading waits until it is let go."""

    asked: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def read(self, index: int, sample: TrainingSample, rows: Rows = ()) -> Features | Quarantined:
        self.asked.append(sample.input_ids_T.numel())
        assert self.gate.wait(20)
        return super().read(index, sample, rows)


def test_reading_goes_ahead_as_far_as_the_budget(
    made_up: ModuleType, context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "READERS", len(LENGTHS))
    directory, samples = written(made_up, tmp_path), made_up.Ragged(LENGTHS)
    plan = plan_of(LENGTHS, CUTS[0])
    turns = list(plan.turns_from(0, plan.steps_per_epoch))
    sizes = [sum(LENGTHS[index] for index in turn.micro_batches[0].samples) for turn in turns]
    for budget, ahead in ((1, 1), (sum(sizes[:3]), 3), (sum(sizes[:3]) - 1, 2), (sum(LENGTHS), 6)):
        features = Gated(directory=directory, manifest=Manifest.load(directory), budget=budget * TOKEN_BYTES)
        feed = StoredFeed(made_up.model(0), context, features)
        feed.start(plan, samples, 0, plan.steps_per_epoch)
        wanted = sorted(LENGTHS[i] for turn in turns[:ahead] for i in turn.micro_batches[0].samples)
        wait = threading.Event()
        for _ in range(200):
            if len(features.asked) >= len(wanted):
                break
            wait.wait(0.01)
        wait.wait(0.05)
        assert sorted(features.asked) == wanted
        features.gate.set()
        for turn in turns:
            feed.rows(turn, {0: Documents.of(turn.micro_batches[0], samples, turn.some)})
        assert sorted(features.asked) == sorted(LENGTHS)
        feed.close()


def test_a_disk_that_does_not_answer_ends_the_run(
    made_up: ModuleType, context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "PATIENCE", 0.05)
    directory, samples = written(made_up, tmp_path), made_up.Ragged(LENGTHS)
    features = Gated(directory=directory, manifest=Manifest.load(directory), budget=PLENTY)
    feed, plan = StoredFeed(made_up.model(0), context, features), plan_of(LENGTHS, CUTS[0])
    feed.start(plan, samples, 0, plan.steps_per_epoch)
    turn = plan.turns(0)[0]
    with pytest.raises(TargetError, match=f"did not come within 0 s: is the disk of {directory} there"):
        feed.rows(turn, {0: Documents.of(turn.micro_batches[0], samples, turn.some)})
    feed.close()
    features.gate.set()


def test_one_sample_outside_the_plan(made_up: ModuleType, context: ParallelContext, tmp_path: Path) -> None:
    """Before the start nothing but the first sample is known; never is one record given out for another sample."""
    directory, samples = written(made_up, tmp_path, lost=(4,)), made_up.Ragged(LENGTHS)
    features = StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=PLENTY)
    feed, plan = StoredFeed(made_up.model(0), context, features), plan_of(LENGTHS, CUTS[0])
    first = feed.whole(samples[0])
    assert isinstance(first, Features)
    assert torch.equal(first.input_ids_T, samples[0].input_ids_T)
    assert isinstance(feed.whole(samples[2]), Quarantined)
    feed.start(plan, samples, 0, 1)
    found = feed.whole(samples[7])
    assert isinstance(found, Features)
    assert torch.equal(found.taps_TNH, made_up.captured(samples[7].input_ids_T.tolist()).taps_TNH)
    refused = feed.whole(samples[4])
    assert isinstance(refused, Quarantined)
    assert refused.reason == "not captured: too odd"
    feed.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.update(format=9), "is of another format"),
        (lambda values: values.pop("checksums"), "is damaged: KeyError"),
        (lambda values: values["checksums"].pop(), "is damaged"),
        (lambda values: values["lost"].clear(), "is damaged"),
        (lambda values: values.update(captured=3), "counts other records than it lists"),
        (lambda values: values.update(surprise=3), "is damaged: TypeError"),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(
    made_up: ModuleType, tmp_path: Path, change: Any, says: str
) -> None:
    directory = written(made_up, tmp_path, lost=(4,))
    assert Manifest.load(directory).captured == len(LENGTHS) - 1
    values = json.loads((directory / "manifest.json").read_text())
    change(values)
    (directory / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(FeatureStoreError, match=says):
        Manifest.load(directory)


SHARED: Cell = {"halo": 2, "ulysses": 2, "ring": 1, "budget": 40 * TOKEN_BYTES, "lengths": LENGTHS, "batch_size": 4}
CELLS: list[Cell] = [
    {**SHARED, "name": "padded", "cut": {"micro_batch_size": 2}},
    {**SHARED, "name": "packed", "cut": {"micro_batch_size": 1, "row_tokens": 22}},
    {**SHARED, "name": "ring", "ulysses": 1, "ring": 2, "halo": 5, "cut": {"micro_batch_size": 3}},
    {**SHARED, "name": "data", "ulysses": 1, "cut": {"micro_batch_size": 3}, "batch_size": 5, "halo": 0},
    # Its second half is read by the second rank alone, and it is a hole for both.
    {**SHARED, "name": "harmed", "cut": {"micro_batch_size": 1}, "ulysses": 1, "ring": 2, "halo": 0, "harmed": 3},
]


@pytest.fixture(scope="module")
def results(made_up: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell on two ranks."""
    place = tmp_path_factory.mktemp("stored")
    whole = written(made_up, place / "whole")
    harmed = written(made_up, place / "harmed")
    sample = made_up.captured(made_up.sample(3, 12).input_ids_T.tolist())
    flip(record(harmed, 3), place_of(record(harmed, 3), sample, 5))
    cells = [{**cell, "features": str(harmed if "harmed" in cell else whole)} for cell in CELLS]
    (place / "cells.json").write_text(json.dumps(cells))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    worker = Path(__file__).with_name("stored_worker.py")
    command = [sys.executable, str(worker), str(place / "cells.json"), str(place), "2", str(store.port)]
    subprocess.run(command, check=True, timeout=120)
    return place


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell["name"])
def test_ranks_read_their_own_rows(made_up: ModuleType, results: Path, cell: Cell) -> None:
    samples, seen = made_up.Ragged(LENGTHS), []
    for rank in range(2):
        wrote = json.loads((results / f"{cell['name']}.{rank}.json").read_text())
        tensors = load_file(results / f"{cell['name']}.{rank}.safetensors")
        _, sequence_rank = wrote["place"]
        for number, turn in enumerate(wrote["turns"]):
            held = Documents(
                indices=tuple(turn["indices"]),
                samples=[samples[index] for index in turn["indices"]],
                packs=turn["packs"],
            )
            if not held.indices:
                assert not tensors[f"{number}.mask_BT"].any()
                continue
            seen += turn["indices"] if sequence_rank == 0 else []
            longest = max(sum(LENGTHS[held.indices[place]] for place in pack) for pack in held.packs)
            layout = Layout(length=longest, ulysses=cell["ulysses"], ring=cell["ring"])
            bad = [cell["harmed"]] if cell.get("harmed") in held.indices else []
            missing = bad if bad and reads(layout, sequence_rank, 5) else []
            expected = made_up.emptied(made_up.looked_up(held, layout, sequence_rank, cell["halo"]), missing, bad)
            if cell["ulysses"] * cell["ring"] == 1:
                expected["last_BXH"] = expected["last_BXH"] / 2
            for name, values in expected.items():
                assert torch.equal(tensors[f"{number}.{name}"], values), (rank, number, name)
            assert len(turn["holes"]) == len(bad)
            for reason in turn["holes"].values():
                assert ("changed since it was written" in reason) == bool(missing), reason
    assert sorted(seen) == list(range(len(LENGTHS)))


def reads(layout: Layout, rank: int, place: int) -> bool:
    return any(piece.start <= place < piece.stop for piece in layout.pieces(rank))
