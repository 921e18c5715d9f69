"""Where the target's engines run: what goes with which topology, and that the training is the same in all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError
from torchspec.core.pipeline import topology_fit
from torchspec.core.pipeline.topology import devices_of, engines_here
from torchspec.core.pipeline.topology_fit import choose_store, topology_problems
from torchspec.core.training.checkpoint_files import read_json
from torchspec.core.workers.supervisor import read_state

COLOCATED = "pipeline.topology=colocated"


@pytest.fixture(scope="module")
def values(tiny_target: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "device": "cpu",
        "target": {"path": str(tiny_target)},
        "data": {
            "train": [str(conversations / "train.jsonl")],
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "max_length": 128,
        },
        "train": {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1, "checkpoint_every": 4},
        "eval": {"samples": 3, "max_new_tokens": 6, "draft_length": 2},
        "draft": {"unroll": 3, "vocab_size": 100},
    }


@pytest.fixture
def configured(values: dict[str, Any], tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *words: load_config(values={**values, "output": str(tmp_path / "run")}, overrides=words)[0]


# What goes with which topology.


def complaints(config: RunConfig) -> dict[str, str]:
    problems = topology_problems(config, registry.devices().spec("cpu"), registry.backends().spec(config.backend))
    assert len({problem.field for problem in problems}) == len(problems)
    return {problem.field: problem.message for problem in problems}


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), set()),
        (("pipeline.topology=inprocess", "target.tensor_parallel=2", "engine.url=http://127.0.0.1:8123"), set()),
        (("pipeline.engines=2",), {"pipeline.engines"}),
        (("pipeline.engines=2", "pipeline.prefetch_mb=3"), {"pipeline.engines", "pipeline.prefetch_mb"}),
        ((COLOCATED,), set()),
        ((COLOCATED, "pipeline.engines=2", "pipeline.prefetch_mb=3", "engine.tensor_parallel=2"), set()),
        ((COLOCATED, "target.tensor_parallel=2"), {"target.tensor_parallel"}),
        ((COLOCATED, "engine.url=http://127.0.0.1:8123"), {"engine.url"}),
        ((COLOCATED, "pipeline.store=device"), set()),
        ((COLOCATED, "pipeline.store=mooncake"), {"pipeline.store"}),
        ((COLOCATED, "pipeline.store=stream"), set()),
        (("pipeline.store=shared",), {"pipeline.store"}),
        ((COLOCATED, "pipeline.trainers=2"), {"pipeline.trainers"}),
        ((COLOCATED, "ray.restarts=1", "mooncake.protocol=rdma"), {"ray.restarts", "mooncake.protocol"}),
    ],
)
def test_settings_that_a_topology_would_ignore_are_named(
    configured: Callable[..., RunConfig], words: tuple[str, ...], fields: set[str]
) -> None:
    assert complaints(configured(*words)).keys() == fields


def test_an_engine_whose_processes_write_files_shares_no_buffers(configured: Callable[..., RunConfig]) -> None:
    config = configured(COLOCATED, "pipeline.store=device").model_copy(update={"backend": "vllm"})
    assert complaints(config) == {"pipeline.store": "the processes of vllm write into files"}


def test_a_run_with_such_a_setting_is_refused_before_it_starts(runs: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=r"pipeline\.engines.*means nothing with pipeline\.topology=inprocess"):
        runs.alone(values, tmp_path / "run", "pipeline.engines=2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "ranks", "count"),
    [
        ((), 1, 1), ((), 8, 8), (("engine.tensor_parallel=2",), 8, 4), (("engine.tensor_parallel=4",), 6, 1),
        (("engine.tensor_parallel=4",), 1, 1), (("pipeline.engines=3", "engine.tensor_parallel=2"), 8, 3),
    ],
)  # fmt: skip
def test_as_many_engines_as_the_ranks_devices_allow(
    configured: Callable[..., RunConfig], words: tuple[str, ...], ranks: int, count: int
) -> None:
    config = configured(COLOCATED, *words)
    assert engines_here(config, ranks) == count
    seen = [devices_of(number, config.engine.tensor_parallel) for number in range(count)]
    assert [device for devices in seen for device in devices] == list(range(count * config.engine.tensor_parallel))


@pytest.mark.parametrize(
    ("backend", "said", "store"), [("hf", "auto", "device"), ("vllm", "auto", "shared"), ("hf", "shared", "shared")]
)
def test_how_features_come_on_one_machine(
    configured: Callable[..., RunConfig], backend: str, said: str, store: str
) -> None:
    config = configured(COLOCATED, f"pipeline.store={said}")
    assert choose_store(config, registry.load_device("cpu"), registry.backends().spec(backend)) == store


def test_how_features_come_across_machines(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Mooncake only where both ends have it."""
    config = configured("pipeline.topology=disaggregated", "ray.address=auto")
    device, (hf, vllm) = registry.load_device("cpu"), map(registry.backends().spec, ("hf", "vllm"))
    for there, stores in ((True, ["mooncake", "stream"]), (False, ["stream", "stream"])):
        monkeypatch.setattr(topology_fit, "mooncake_is_here", lambda there=there: there)
        assert [choose_store(config, device, backend) for backend in (hf, vllm)] == stores
    wanted = config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"store": "mooncake"})})
    (problem,) = topology_problems(wanted, registry.devices().spec("cpu"), vllm)
    assert problem.message == "the environment of vllm has no Mooncake"


# The training is the same.

STEPS = 12


@pytest.mark.slow
def test_one_rank_with_an_engine_beside_it_that_is_killed(
    runs: ModuleType, values: dict[str, Any], conversations: Path, tmp_path: Path
) -> None:
    """In the middle of the run, while more features are to be made: nothing is lost, and all comes out the same.

    Checkpoints are measured by processes of their own, and the best of them is exported.
    """
    words = ("train.epochs=3", "train.checkpoint_every=6")
    expected = runs.alone(values, tmp_path / "inprocess", *words)
    run, killed = tmp_path / "colocated", set()

    def progress(stage: str, step: int, total: int) -> None:
        if (stage, step) == ("train", 2):
            (directory,) = (run / "engine").glob("*/engine-0")
            state = read_state(directory)
            assert state is not None
            assert state.state == "ready"
            killed.add(state.pid)
            os.kill(state.pid, signal.SIGKILL)

    validation = (f"data.validation=[{conversations / 'validation.jsonl'}]", "eval.every=6")
    runs.alone(values, run, *words, COLOCATED, "pipeline.prefetch_mb=1", *validation, progress=progress)
    assert len(killed) == 1
    assert len({row["loss"] for row in runs.rows(expected)}) == STEPS
    assert runs.figures(run) == runs.figures(expected)
    assert not any("quarantined" in row for row in runs.rows(run))
    (state,) = [read_state(directory) for directory in (run / "engine").glob("*/engine-0")]
    assert state is not None
    assert (state.state, state.generation) == ("closed", 2), "the engine was lost before the last features were made"

    assert runs.rows(run, "validation") == []
    served = {row["step"]: row["acceptance_length"] for row in runs.rows(run, "served")}
    assert served.keys() == {6, 12}
    best = max(served, key=lambda step: (served[step], -step))
    assert read_json(run / "checkpoints" / "best.json")["step"] == best
    assert (run / "draft" / "model.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_two_ranks_that_share_packed_sequences(runs: ModuleType, values: dict[str, Any], tmp_path: Path) -> None:
    """With an engine each, whose rows they both read; documents of which one of them reads nothing among them."""
    values = {**values, "train": {**values["train"], "tokens_per_rank": 64}}
    del values["train"]["micro_batch_size"]
    words = ("parallel.ulysses=2", "train.epochs=2")
    expected, run, sent = (tmp_path / name for name in ("inprocess", "colocated", "stream"))
    streamed = (*words, COLOCATED, "pipeline.store=stream")
    runs.two_ranks(values, {expected: words, run: (*words, COLOCATED), sent: streamed})
    assert len(list((run / "engine").glob("*/engine-*/worker.json"))) == 2
    assert len({row["loss"] for row in runs.rows(expected)}) == 8
    assert runs.figures(run) == runs.figures(sent) == runs.figures(expected)


@pytest.mark.slow
def test_ranks_and_engines_may_change_when_a_run_goes_on(
    runs: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:
    """Two ranks that share sequences, with an engine each; then one that has two engines; then no engine beside it."""
    words = ("train.epochs=3", "train.schedule=constant")
    expected = runs.alone(values, tmp_path / "whole", *words)
    run = tmp_path / "run"
    runs.two_ranks(values, {run: (*words, COLOCATED, "parallel.ulysses=2", "train.max_steps=5")})
    runs.alone(values, run, *words, COLOCATED, "pipeline.engines=2", "train.max_steps=9")
    runs.alone(values, run, *words)
    assert [row["loss"] for row in runs.rows(run)] == pytest.approx([row["loss"] for row in runs.rows(expected)], 1e-5)
    assert [row["samples"] for row in runs.rows(run)] == [row["samples"] for row in runs.rows(expected)]
    assert read_json(run / "ledger.json")["wrong"] == []
