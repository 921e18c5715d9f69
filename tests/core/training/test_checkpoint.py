"""Checkpoints that are damaged, do not fit, or cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.errors import CheckpointError
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training import checkpoint
from torchspec.core.training import checkpoint_files as files
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.sharding import unsharded_state
from torchspec.core.training.signals import StopRequest

CONFIG = {"epochs": 2, "checkpoint_every": 2, "keep_last": 3}  # 6 steps: checkpoints 2, 4, 6


@pytest.fixture
def trained(tiny: ModuleType, context: ParallelContext, tmp_path: Path) -> Any:
    trainer = tiny.make_trainer(tiny.Job(directory=tmp_path, config=CONFIG), context)
    with MetricsLog(tmp_path / "metrics.jsonl") as log, StopRequest() as stop:
        trainer.run(log, stop)
    return trainer


def shard(directory: Path) -> Path:
    return next((directory / "state").iterdir())


def truncate(directory: Path) -> None:
    path = shard(directory)
    os.truncate(path, path.stat().st_size // 2)


def flip(directory: Path) -> None:
    data = bytearray(shard(directory).read_bytes())
    data[-5] ^= 1
    shard(directory).write_bytes(bytes(data))


def drop_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def cut_manifest(directory: Path) -> None:
    os.truncate(directory / "manifest.json", 40)


def drop_shard(directory: Path) -> None:
    shard(directory).unlink()


def garble_progress(directory: Path) -> None:
    (directory / "trainer.json").write_text("{}")


DAMAGES = [truncate, flip, drop_manifest, cut_manifest, drop_shard, garble_progress]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    trained: Any, context: ParallelContext, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    checkpoints = trained.setup.checkpoints
    damage(files.directory_of(checkpoints, 6))
    with caplog.at_level("WARNING", logger="torchspec"):
        chosen = checkpoint.choose(checkpoints, context)
    assert chosen == files.directory_of(checkpoints, 4)
    assert "step_00000006 is damaged and not used" in caplog.text
    assert "resuming from the previous checkpoint, step 4" in caplog.text
    assert (checkpoints / "step_00000006.damaged").is_dir()
    trained.resume(chosen)
    assert trained.counters.step == 4
    with pytest.raises(CheckpointError):
        checkpoint.load_draft_state(checkpoints / "step_00000006.damaged")


def test_with_every_checkpoint_damaged_nothing_starts_from_scratch(trained: Any, context: ParallelContext) -> None:
    for step in (2, 4, 6):
        truncate(files.directory_of(trained.setup.checkpoints, step))
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* is whole.*step 6: .*truncated.*step 2: "):
        checkpoint.choose(trained.setup.checkpoints, context)


def test_no_checkpoint_at_all_is_a_fresh_start(context: ParallelContext, tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path / "none", context) is None


def test_leftovers_of_a_kill_are_cleared_and_a_replaced_checkpoint_comes_back(
    trained: Any, context: ParallelContext
) -> None:
    checkpoints = trained.setup.checkpoints
    (checkpoints / ".step_00000008.partial" / "state").mkdir(parents=True)
    six = files.directory_of(checkpoints, 6)
    six.rename(checkpoints / ".step_00000006.replaced")  # killed between the two renames of a replacement
    assert checkpoint.choose(checkpoints, context) == six
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004", "step_00000006"]


def test_nothing_in_a_checkpoint_is_a_pickle(trained: Any) -> None:
    for path in trained.setup.checkpoints.rglob("*"):
        if path.is_file():
            assert path.suffix in {".json", ".safetensors"}, path


def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(trained: Any) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in trained.setup.checkpoints.rglob("*") if file.is_file()}
    assert {"vocabulary.safetensors", "rank_00000.safetensors"} <= modes.keys()
    assert set(modes.values()) == {modes["draft.json"]}, modes


def test_weights_are_stored_and_read_back_to_the_bit(trained: Any) -> None:
    facts, state = checkpoint.load_draft_state(files.directory_of(trained.setup.checkpoints, 6))
    assert facts == trained.setup.facts
    expected = unsharded_state(trained.model.draft)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)
    vocabulary = checkpoint.load_vocabulary(files.directory_of(trained.setup.checkpoints, 6))
    assert torch.equal(vocabulary.ids_N, trained.setup.vocabulary.ids_N)


def test_another_run_is_refused_with_every_difference(
    tiny: ModuleType, trained: Any, context: ParallelContext, tmp_path: Path
) -> None:
    facts = {"data": {"fingerprint": "new"}, "draft": {"unroll": 5}}
    other = tiny.make_trainer(tiny.Job(directory=tmp_path, config=CONFIG, seed=4, facts=facts), context)
    with pytest.raises(CheckpointError) as caught:
        other.resume(files.directory_of(trained.setup.checkpoints, 6))
    message = str(caught.value)
    assert "data.fingerprint" not in message  # a whole missing section is named once
    for line in (
        "data: the checkpoint has None",
        "draft: the checkpoint has None",
        "order.seed: the checkpoint has 3, ",
    ):
        assert line in message


def test_tensors_that_do_not_fit_are_named(trained: Any, context: ParallelContext) -> None:
    directory = files.directory_of(trained.setup.checkpoints, 6)
    tensors = trained.updater.tensors()
    tensors["draft.surplus.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1 tensors differ, first 'draft\.surplus\.weight'"):
        checkpoint.load(directory, tensors, trained.setup.facts, context)


def test_a_checkpoint_of_another_format_says_so(trained: Any) -> None:
    directory = files.directory_of(trained.setup.checkpoints, 6)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99; this torchspec reads 1"):
        files.read_manifest(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 96 KiB: room for one checkpoint, not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting needs privileges; the limit on file sizes is tested without")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(
    tiny: ModuleType, context: ParallelContext, small_disk: Path, tmp_path: Path
) -> None:
    trainer = tiny.make_trainer(tiny.Job(directory=small_disk, config={**CONFIG, "keep_last": 9}), context)
    with (
        MetricsLog(tmp_path / "metrics.jsonl") as log,
        StopRequest() as stop,
        pytest.raises(
            CheckpointError, match=r"(?s)No space left on device.*step_0000000\d is intact.*Make room.*it begins there"
        ),
    ):
        trainer.run(log, stop)
    survivors = files.steps_on_disk(small_disk / "checkpoints")
    assert survivors
    assert not list((small_disk / "checkpoints").glob(".step_*"))  # the unfinished one made room again
    resumed = tiny.make_trainer(tiny.Job(directory=small_disk, config={**CONFIG, "keep_last": 9}), context)
    chosen = checkpoint.choose(small_disk / "checkpoints", context)
    assert chosen == files.directory_of(small_disk / "checkpoints", survivors[-1])
    resumed.resume(chosen)
    assert resumed.counters.step == survivors[-1]


def test_an_unwritable_directory_is_named(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path, trained: Any
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    snapshot = checkpoint.Snapshot(
        step=2, tensors={}, progress={}, facts=trained.setup.facts, vocabulary=trained.setup.vocabulary
    )
    with pytest.raises(CheckpointError, match=r"step 2 could not be written to .*file"):
        checkpoint.save(blocked, snapshot, context, keep_last=1)
