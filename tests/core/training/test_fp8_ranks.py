"""FP8 with data parallelism, shared and packed sequences, a shared head, accumulation, recomputing and offloading.

Ranks are real processes over gloo. What a rank scales together depends on how the work is divided, so numbers do as
well: no more, however, than FP8 is off in one process that owns everything. Sizes are multiples of 16, the draft's head
included, but for those of documents. That weights gathered in FP8 are whole weights in FP8 is in test_fp8_gather.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

WORKER = Path(__file__).parents[1] / "parallel" / "sequence_worker.py"
Cell = dict[str, Any]
Results = dict[str, dict[str, Tensor]]

DRAFTS = {
    "eagle3": {"algorithm": "eagle3"},
    "dflash": {
        "algorithm": "dflash",
        "steps": {"block_size": 4, "num_layers": 2, "taps": [1, 3, 4]},
        "options": {"num_anchors": 7},
    },
}
WAYS: dict[str, Cell] = {
    "data parallel": {},
    "ulysses": {"ulysses": 2, "exchange": "ulysses", "micro_batch_size": 8},
    "packed, recomputed, offloaded": {"ulysses": 2, "row_tokens": 80, "recompute": True, "offload": True},
    "ring, a part of the head": {"ring": 2, "exchange": "ring", "shard_logits": "vocabulary"},
}


ALONE: dict[str, Cell] = {"alone": {}, "alone, one by one": {"micro_batch_size": 1}}
RUNS = [
    *(("eagle3", "row", way) for way in (*ALONE, *WAYS)),
    *(("eagle3", "tensor", way) for way in ("alone", "ring, a part of the head")),
    *(("dflash", "row", way) for way in ("alone", "packed, recomputed, offloaded", "ring, a part of the head")),
]
DIVIDED = [run for run in RUNS if run[2] != "alone"]
GATHERED = [run for run in RUNS if run[2] in WAYS]
HALF = {"micro_batch_size": 4}
IN_TURN = {**HALF, "batch": [0, 2, 4, 6, 1, 3, 5, 7]}
"""One process does what two ranks do at a time."""
HALVED = [(draft, scaling) for draft in DRAFTS for scaling in ("row", "tensor")]


def cells(ranks: int) -> list[Cell]:
    ways = WAYS if ranks == 2 else ALONE
    given = {name: {**draft, "dtype": "bfloat16", "draft_vocabulary": 48} for name, draft in DRAFTS.items()}
    made = [
        {**given[draft], **ways[way], "fp8": scaling, "name": f"{draft}, {scaling}, {way}"}
        for draft, scaling, way in RUNS
        if way in ways
    ]
    if ranks == 2:
        made += [{**cell, "fp8_gather": True, "name": f"{cell['name']}, gathered"} for cell in made]
    halves = {"fp8_gather": True, **HALF} if ranks == 2 else IN_TURN
    made += [
        {**given[draft], **halves, "fp8": scaling, "name": f"{draft}, {scaling}, halves on {ranks}"}
        for draft, scaling in HALVED
    ]
    if ranks == 1:
        made += [{**cell, "name": f"{name}, bf16"} for name, cell in given.items()]
        made += [{**cell, "dtype": "float64", "name": f"{name}, exact"} for name, cell in given.items()]
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    found: Results = {}
    for ranks in (1, 2):
        here = tmp_path_factory.mktemp("fp8")
        (here / "cells.json").write_text(json.dumps(cells(ranks)))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        command = [sys.executable, str(WORKER), str(here / "cells.json"), str(here), str(ranks), str(store.port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr
        found |= {path.stem: load_file(path) for path in here.glob("*.safetensors")}
    return found


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, the relative 2-norm."""
    names = [name for name in expected if name.startswith("grad.")]
    assert {name for name in got if name.startswith("grad.")} == set(names)
    far = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in names)
    return float((far / sum(float(expected[name].double().square().sum()) for name in names)) ** 0.5)


def loss(found: dict[str, Tensor]) -> float:
    return float(found["sum.numerator"] / found["sum.denominator"])


@pytest.mark.parametrize(("draft", "scaling"), [run[:2] for run in RUNS if run[2] == "alone"])
def test_fp8_is_further_from_exact_than_bf16_and_not_far(results: Results, draft: str, scaling: str) -> None:
    """Gradients of all matrices, of 3 and 2 fraction bits, not 7; fp32 like those of bf16, which sharding sums."""
    exact, bf16 = results[f"{draft}, exact"], results[f"{draft}, bf16"]
    found = results[f"{draft}, {scaling}, alone"]
    assert 3 * apart(bf16, exact) < apart(found, exact) < 0.2
    assert loss(found) == pytest.approx(loss(exact), rel=0.02)
    assert all(found[name].dtype == value.dtype for name, value in bf16.items())


@pytest.mark.parametrize(("draft", "scaling", "way"), DIVIDED)
def test_however_the_work_is_divided_fp8_errs_no_more(results: Results, draft: str, scaling: str, way: str) -> None:
    exact, alone = results[f"{draft}, exact"], results[f"{draft}, {scaling}, alone"]
    found = results[f"{draft}, {scaling}, {way}"]
    error = apart(alone, exact)
    assert apart(found, exact) <= 1.15 * error
    assert apart(found, alone) <= error
    assert loss(found) == pytest.approx(loss(alone), rel=0.01)
    how = {**ALONE, **WAYS}[way]
    assert int(found["positions"]) % (16 * how.get("ulysses", 1) * how.get("ring", 1)) == 0, (
        "of each rank a multiple of 16"
    )
    for name in ("sum.sums/supervised", "tokens"):
        assert found[name].tolist() == alone[name].tolist()


@pytest.mark.parametrize(("draft", "scaling", "way"), GATHERED)
def test_weights_gathered_in_fp8_change_nothing(results: Results, draft: str, scaling: str, way: str) -> None:
    """To the last bit: no weight of these drafts has entries that other scales would round otherwise."""
    found, other = (results[f"{draft}, {scaling}, {way}{what}"] for what in (", gathered", ""))
    assert found.keys() == other.keys()
    assert all(torch.equal(found[name], value) for name, value in other.items())


@pytest.mark.parametrize(("draft", "scaling"), HALVED)
def test_ranks_that_gather_in_fp8_do_what_one_process_does_in_turn(results: Results, draft: str, scaling: str) -> None:
    """The same micro-batches, with whole weights in one process: loss and all gradients to the last bit."""
    found, alone = (results[f"{draft}, {scaling}, halves on {ranks}"] for ranks in (2, 1))
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], value) for name, value in alone.items() if name != "positions")
