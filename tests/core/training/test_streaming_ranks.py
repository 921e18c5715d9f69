"""Streams of ranks that share sequences, as real processes: each gets its rows, and all ask alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core.parallel.shards import Layout
from torchspec.core.training.capturing import Documents
from torchspec.core.training.plan import Cut, Plan, Shares, Turn

Cell = dict[str, Any]
Wrote = dict[str, Any]

RANKS = 4
LENGTHS = (5, 9, 3, 12, 7, 8, 4, 11, 6, 10, 2, 13)
BATCH, STEPS = 5, 4
REFUSED = (1, 8)
ROWS, PACKED = {"micro_batch_size": 2}, {"micro_batch_size": 1, "row_tokens": 30}


def cell(ulysses: int, ring: int, cut: dict[str, int], halo: int, refusing: int) -> Cell:
    """`refusing`: the rank, of those that share a sequence, that gets nothing of some samples; -1: none."""
    return {
        "name": f"{ulysses}x{ring}-{'packed' if cut is PACKED else 'rows'}-{halo}{'-holes' * (refusing >= 0)}",
        "ulysses": ulysses, "ring": ring, "cut": cut, "halo": halo, "refused": REFUSED, "refusing": refusing,
        "engines": 1 + halo, "budget": 500 if halo else 10**9, "lengths": LENGTHS, "batch_size": BATCH, "steps": STEPS,
    }  # fmt: skip


CELLS = {
    made["name"]: made
    for (ulysses, ring), cut, (halo, holes) in product(
        ((1, 1), (2, 1), (2, 2)), (ROWS, PACKED), ((0, False), (3, False), (3, True))
    )
    for made in [cell(ulysses, ring, cut, halo, ulysses * ring - 1 if holes else -1)]
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("streams")
    (directory / "cells.json").write_text(json.dumps(list(CELLS.values())))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    worker = Path(__file__).with_name("streaming_worker.py")
    command = [sys.executable, str(worker), str(directory / "cells.json"), str(directory), str(RANKS), str(store.port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return directory


def by_sequence(results: Path, cell: Cell) -> dict[int, dict[int, Wrote]]:
    """What the ranks wrote: of each data index, by rank of the sequence."""
    found: dict[int, dict[int, Wrote]] = {}
    for rank in range(RANKS):
        place = results / f"{cell['name']}.{rank}"
        wrote = json.loads(Path(f"{place}.json").read_text())
        data, sequence = wrote["place"]
        found.setdefault(data, {})[sequence] = {**wrote, "tensors": load_file(f"{place}.safetensors")}
    assert {len(sharing) for sharing in found.values()} == {cell["ulysses"] * cell["ring"]}
    return found


def planned(made_up: ModuleType, cell: Cell, data: int) -> list[tuple[Turn, Documents]]:
    shares = Shares(indices=(data,), of=RANKS // (cell["ulysses"] * cell["ring"]))
    plan = Plan(LENGTHS, Cut(**cell["cut"]), shares, batch_size=BATCH, bucket_size=1, seed=0)
    samples = made_up.Ragged(LENGTHS)
    turns = list(plan.turns_from(0, STEPS))
    return [(turn, Documents.of(turn.micro_batches[data], samples, turn.some)) for turn in turns]


@pytest.mark.parametrize("name", CELLS)
def test_every_rank_gets_its_rows(results: Path, made_up: ModuleType, name: str) -> None:
    """With the holes that any of those found who share them, and the reason where it is known."""
    cell = CELLS[name]
    for data, sharing in by_sequence(results, cell).items():
        for number, (turn, documents) in enumerate(planned(made_up, cell, data)):
            holes = [sample for sample in REFUSED if sample in documents.indices and cell["refusing"] >= 0]
            for rank, wrote in sharing.items():
                missing = holes if rank == cell["refusing"] else []
                reasons = {s: f"sample {s} is refused" if s in missing else "" for s in holes}
                told = {documents.indices.index(sample): reason for sample, reason in reasons.items()}
                assert wrote["turns"][number] == [turn.step, turn.number, {str(n): why for n, why in told.items()}]
                got = {each.split(".")[1]: x for each, x in wrote["tensors"].items() if each.startswith(f"{number}.")}
                if not documents.indices:
                    assert not any(got[each].any() for each in ("mask_BT", "taps_BSF", "last_BXH"))
                elif len(sharing) == 1:
                    made_up.check_alone(got, documents, holes)
                else:
                    layout = Layout(length=got["ids_BT"].shape[1], ulysses=cell["ulysses"], ring=cell["ring"])
                    expected = made_up.looked_up(documents, layout, rank, cell["halo"])
                    made_up.check(got, made_up.emptied(expected, missing, holes))


def requests(wrote: Wrote) -> Iterator[tuple[int, set[str], dict[str, Any]]]:
    """(engine, the names of the call, a request of it) of everything that a rank asked for."""
    for engine, calls in enumerate(wrote["asked"]):
        for call in calls:
            for request in call:
                yield engine, {each["id"] for each in call}, request


@pytest.mark.parametrize("name", CELLS)
def test_ranks_that_share_a_sequence_ask_alike(results: Path, made_up: ModuleType, name: str) -> None:
    """The same engine, together with the same others, and each rank for another part. All of the plan is asked for,
    and nothing for those who stand in."""
    cell = CELLS[name]
    stood_in = False
    for data, sharing in by_sequence(results, cell).items():
        known: dict[str, tuple[Any, ...]] = {}
        taken: dict[str, list[int]] = {}
        for wrote in sharing.values():
            for engine, names, request in requests(wrote):
                facts = (engine, names, request["parts"], request["ids"])
                assert known.setdefault(request["id"], facts) == facts
                taken.setdefault(request["id"], []).append(request["part"])
        for record, (_, _, parts, _) in known.items():
            assert sorted(taken[record]) == list(range(max(1, len(parts)))), "a part that nobody takes, or two"
        plan = planned(made_up, cell, data)
        stood_in |= any(not documents.indices for _, documents in plan)
        wanted = [sample.input_ids_T.tolist() for _, documents in plan for sample in documents.real]
        assert sorted(facts[3] for facts in known.values()) == sorted(wanted)
    assert stood_in or cell["cut"] is PACKED or len(sharing) == RANKS, "no rank stood in"


@pytest.mark.parametrize("name", CELLS)
def test_what_is_captured_together_is_what_ranks_capture_that_need_it_at_once(results: Path, name: str) -> None:
    """So it comes out the same to the last bit."""
    for sharing in by_sequence(results, CELLS[name]).values():
        streamed = [call for calls in sharing[0]["asked"] for call in calls]
        direct = [call for wrote in sharing.values() for call in wrote["direct"]]
        groups = [sorted(sorted(each["ids"][0] for each in call) for call in calls) for calls in (streamed, direct)]
        assert groups[0] == groups[1]


@pytest.mark.parametrize("name", CELLS)
def test_every_engine_has_its_share_of_the_work(results: Path, name: str) -> None:
    """With fewer documents in a pass than ranks too."""
    cell = CELLS[name]
    calls = [0] * cell["engines"]
    for sharing in by_sequence(results, cell).values():
        for engine, asked in enumerate(sharing[0]["asked"]):
            calls[engine] += len(asked)
    groups = RANKS // (cell["ulysses"] * cell["ring"])
    assert max(calls) - min(calls) <= groups, calls
