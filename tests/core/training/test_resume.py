"""A run that was killed anywhere and resumed is, to the last bit, the run that was never interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from torchspec.core.training import checkpoint
from torchspec.core.training import checkpoint_files as files

STEPS = 20


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request: pytest.FixtureRequest, runs: dict[int, Path]) -> Path:
    return runs[request.param]


TIMINGS = ("tokens_per_second", "step_seconds", "time", "memory")


def history(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_run(run: Path, reference: Path) -> None:
    assert history(run) == history(reference)
    assert [row["step"] for row in history(run) if row["kind"] == "train"] == list(range(1, STEPS + 1))
    mine, theirs = (files.directory_of(directory / "checkpoints", STEPS) for directory in (run, reference))
    shards = sorted(path.relative_to(theirs) for part in ("state", "rng") for path in (theirs / part).iterdir())
    for shard in shards:
        got, expected = load_file(mine / shard), load_file(theirs / shard)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
    assert (mine / "trainer.json").read_text() == (theirs / "trainer.json").read_text()
    remembered = files.read_json(mine / "trainer.json")["remembered"]
    assert {name: len(values) for name, values in remembered.items()} == {"alpha": 2, "supervised": 2}


@pytest.mark.parametrize("step", [1, 7, 15])
def test_killed_after_a_step(results: Path, step: int) -> None:
    """The kill falls before the checkpoint that is due at the step itself."""
    resumed = json.loads((results / f"kill-{step}-b.json").read_text())
    assert resumed["started"] == (step - 1) // 3 * 3
    assert_same_run(results / f"kill-{step}", results / "reference")


def test_killed_at_any_moment(results: Path) -> None:
    assert json.loads((results / "moment-end.json").read_text())["started"] > 0
    assert_same_run(results / "moment", results / "reference")


def test_killed_while_validating(results: Path) -> None:
    """The step's checkpoint is there before its validation, which the resumed run does again, to the same end."""
    names = ("validating-4", "validating-8", "validating-12", "validating-late")
    reports = [json.loads((results / f"{name}.json").read_text()) for name in names]
    # Of the last kill, at a moment rather than at a step, the other rank may die first and the main one say so.
    assert reports[3].pop("error", "PeerError") == "PeerError"
    assert [report.get("started", 12) for report in reports] == [0, 4, 8, 12]
    run, reference = results / "validated-killed", results / "validated"
    assert_same_run(run, reference)
    scores = {row["step"]: row["acceptance_length"] for row in history(run) if row["kind"] == "validation"}
    assert scores == {4: 1.5, 8: 1.2, 12: 1.9, 16: 1.9, 20: 1.3}
    for place in (run, reference):
        assert files.read_json(place / "checkpoints" / "best.json")["step"] == 12
        directories = [files.directory_of(place / "checkpoints", step) for step in (12, 20)]
        assert [files.read_manifest(directory).score for directory in directories] == [1.9, 1.3]


def test_a_validation_that_fails_on_one_rank_fails_all_and_its_step_is_kept(runs: dict[int, Path]) -> None:
    said = json.loads((runs[2] / "failed-validation.json").read_text())["ranks"]
    assert said == ["PeerError: rank 1 failed: TorchspecError: no luck", "TorchspecError: no luck"]
    assert files.steps_on_disk(runs[2] / "failed-validation" / "checkpoints") == [3, 4]


@pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("INT", 2)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(results: Path, name: str, number: int) -> None:
    assert json.loads((results / f"{name}-a.json").read_text()) == {"step": 8, "signal": number, "started": 0}
    assert json.loads((results / f"{name}-b.json").read_text()) == {"step": STEPS, "signal": 0, "started": 8}
    assert_same_run(results / name, results / "reference")


def test_one_rank_that_cannot_write_fails_all_and_the_previous_checkpoint_serves(runs: dict[int, Path]) -> None:
    failed = json.loads((runs[2] / "full-a.json").read_text())
    assert failed["error"] == "CheckpointError"
    assert "rank 1: " in failed["message"]
    assert "step_00000003 is intact" in failed["message"]
    assert json.loads((runs[2] / "full-b.json").read_text())["started"] == 3
    assert_same_run(runs[2] / "full", runs[2] / "reference")


def test_the_run_learns_and_draws(results: Path) -> None:
    """The comparison would mean nothing if the losses stood still or nothing random happened."""
    losses = [row["loss"] for row in history(results / "reference")]
    assert len(set(losses)) == STEPS
    assert losses[-1] < losses[0]


def test_only_the_newest_checkpoints_stay(results: Path) -> None:
    assert files.steps_on_disk(results / "reference" / "checkpoints") == [18, 20]


def test_a_checkpoint_is_read_whole_without_ranks(results: Path) -> None:
    """The shards of all ranks put together, from each file's own rows."""
    directory = files.directory_of(results / "reference" / "checkpoints", STEPS)
    facts, state = checkpoint.load_draft_state(directory)
    assert facts["identity"]["order"]["seed"] == 3
    shards = [load_file(path) for path in sorted((directory / "state").iterdir())]
    for name, value in state.items():
        parts = [shard[f"draft.{name}"] for shard in shards if f"draft.{name}" in shard]
        assert torch.equal(torch.cat(parts), value), name


def test_a_run_goes_on_with_another_number_of_ranks(runs: dict[int, Path]) -> None:
    """Half on 3 ranks and the rest on 1 ends where 1 rank alone ends (fp64; sums in another order)."""
    shared = runs[1].parent
    assert json.loads((runs[1] / "reshard-b.json").read_text()) == {"step": STEPS, "signal": 0, "started": 10}
    ends = [files.directory_of(run / "checkpoints", STEPS) for run in (shared / "reshard", runs[1] / "alone")]
    got, expected = (checkpoint.load_draft_state(end)[1] for end in ends)
    for name, value in expected.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=0, atol=1e-13), name
