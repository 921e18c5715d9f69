"""Two ranks of somebody's process group, each with samples of its own: the numbers of one process with all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]

CLOSE = 2e-6
"""Relative, in float32: sums are added in another order."""

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("online")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    worker = Path(__file__).with_name("online_worker.py")
    command = [sys.executable, str(worker), str(tiny_target), str(directory), str(store.port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return directory


@pytest.fixture(scope="module")
def found(results: Path) -> Found:
    """Of each rank."""
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
def test_ranks_are_one_process_with_all_samples(
    online: ModuleType, tiny_target: Path, results: Path, found: Found, algorithm: str
) -> None:
    """The second rank has nothing for the last window, which no rank waits for."""
    policy = online.load_policy(tiny_target)
    alone = online.make(policy, algorithm)
    for number in range(9):
        alone.add(**online.sample(policy, alone, number))
    evaluated = alone.evaluate([online.sample(policy, alone, number) for number in range(9)])
    rows = [online.figures(alone.step()) for _ in range(3)]
    ours, theirs = (each[algorithm] for each in found)
    assert ours["nothing"] is None
    assert theirs["nothing"] is None
    assert ours["rows"] == theirs["rows"]
    exact = ("step", "samples", "tokens", "empty_windows", "stale_samples", "lr")
    for mine, row in zip(ours["rows"], rows, strict=True):
        assert [mine[name] for name in exact] == [row[name] for name in exact]
        assert mine["loss"] == pytest.approx(row["loss"], rel=CLOSE)
        assert mine["grad_norm"] == pytest.approx(row["grad_norm"], rel=10 * CLOSE)
    assert ours["evaluated"]["samples"] == 9
    assert ours["evaluated"]["loss"] == pytest.approx(evaluated["loss"], rel=CLOSE)
    for rank in range(2):
        weights = load_file(results / f"{algorithm}-{rank}.safetensors")
        for name, tensor in alone.draft_weights():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_every_rank_counts_its_own(found: Found) -> None:
    counts = [each["eagle3"]["counts"] for each in found]
    assert counts == [{"received": 7, "trained": 7, "dropped": 0}, {"received": 2, "trained": 2, "dropped": 0}]
    assert [each["eagle3"]["left"] for each in found] == [None, None]


def test_ranks_that_continue_from_a_state_repeat_the_undisturbed_run(found: Found) -> None:
    assert all(each[algorithm]["resumed"] for each in found for algorithm in ("eagle3", "dflash"))
    assert "rank: the state has [9, 9]" in found[0]["eagle3"]["other_rank"]


def test_the_first_rank_exports_and_all_know(results: Path, found: Found) -> None:
    assert (results / "eagle3-draft" / "model.safetensors").is_file()
    assert found[0]["eagle3"]["distance"] == found[1]["eagle3"]["distance"] < 1e-5


def test_ranks_in_bfloat16_are_one_process_in_bfloat16(online: ModuleType, tiny_target: Path, found: Found) -> None:
    policy = online.load_policy(tiny_target)
    more = {"precision": {"compute": "bfloat16"}, "train": {**online.TRAIN, "batch_size": 9}}
    alone = online.make(policy, **more)
    for number in range(9):
        alone.add(**online.sample(policy, alone, number))
    row = online.figures(alone.step())
    assert found[0]["bfloat16"]["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert found[0]["bfloat16"]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-2)


def test_ranks_with_other_settings_are_refused(found: Found) -> None:
    said = "rank 1: was given other settings than rank 0: seed: rank 0 has 0, rank 1 1"
    assert all(said in each["settings"] for each in found)


def test_no_rank_waits_for_one_whose_samples_are_refused(found: Found) -> None:
    assert "SampleError: sample 's0' is not taken" in found[0]["refused"]
    assert "PeerError: nothing was evaluated, as rank 0 refused what it was given: sample 's0'" in found[1]["refused"]
    assert [each["works_on"] for each in found] == [2, 2]
    assert all("ClosedError" in each["closed"] for each in found)


def test_a_rank_that_does_not_come_is_an_error_in_time(found: Found) -> None:
    assert "PeerError: the other ranks of the group did not call step() within 1 s" in found[0]["late"]
    assert found[0]["waited"] < 30
