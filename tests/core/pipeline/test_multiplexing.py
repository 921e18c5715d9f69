"""Engine and trainer on one device: who starts a service for it, and how its memory is divided."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError, UnavailableError
from torchspec.core.interfaces.device import Availability
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.launch import launch
from torchspec.core.pipeline.multiplexing import multiplexed
from torchspec.core.pipeline.topology_fit import engine_fraction, topology_problems, trainer_fraction

COLOCATED = "pipeline.topology=colocated"


class Service:
    """Notes what is done with it."""

    def __init__(self, *, there: bool = True, starts: bool = True) -> None:
        self.there, self.starts = there, starts
        self.running: list[Path] = []
        self.stopped = 0

    def available(self) -> Availability:
        return Availability(ok=self.there, reason="" if self.there else "its program is missing")

    def start(self, directory: Path) -> Callable[[], None]:
        if not self.starts:
            raise UnavailableError("it would not start")
        assert not list(directory.iterdir())
        self.running.append(directory)
        return self._stop

    def _stop(self) -> None:
        self.running.pop()
        self.stopped += 1

    def environment(self, directory: Path) -> Mapping[str, str]:
        return {"SERVICE": str(directory)}


@pytest.fixture
def configured(tiny_target: Path, conversations: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    values: dict[str, Any] = {
        "device": "cpu", "target": {"path": str(tiny_target)}, "output": str(tmp_path / "run"),
        "data": {"train": [str(conversations / "train.jsonl")]},
    }  # fmt: skip
    return lambda *words: load_config(values=values, overrides=words)[0]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Service | None], None]:
    def put(service: Service | None) -> None:
        device = replace(registry.load_device("cpu"), multiplexer=service)
        monkeypatch.setattr(registry, "load_device", lambda name: device)

    return put


def test_it_runs_as_long_as_the_run(
    configured: Callable[..., RunConfig], on_device: Callable[[Service | None], None]
) -> None:
    service = Service()
    on_device(service)
    with multiplexed(configured(COLOCATED), "cpu") as variables:
        (directory,) = service.running
        assert variables == {"SERVICE": str(directory)}
    assert (service.running, service.stopped) == ([], 1)
    assert not directory.exists()
    with pytest.raises(KeyError), multiplexed(configured(COLOCATED), "cpu"):
        raise KeyError
    assert service.stopped == 2


@pytest.mark.parametrize("words", [(), (COLOCATED, "pipeline.multiplex=off")])
def test_it_is_not_started_where_nobody_needs_it(
    configured: Callable[..., RunConfig], on_device: Callable[[Service | None], None], words: tuple[str, ...]
) -> None:
    service = Service()
    on_device(service)
    with multiplexed(configured(*words), "cpu") as variables:
        assert variables == {}
    assert service.stopped == 0


@pytest.mark.parametrize(
    ("service", "why"),
    [
        (None, "device cpu has no such service"),
        (Service(there=False), "its program is missing"),
        (Service(starts=False), "it would not start"),
    ],
)
def test_where_it_cannot_be_had(
    configured: Callable[..., RunConfig],
    on_device: Callable[[Service | None], None],
    service: Service | None,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run goes on, unless it was asked for."""
    on_device(service)
    with caplog.at_level(logging.WARNING), multiplexed(configured(COLOCATED), "cpu") as variables:
        assert variables == {}
    assert ("take turns" in caplog.text) == (why == "it would not start")
    with pytest.raises(ConfigError, match=why), multiplexed(configured(COLOCATED, "pipeline.multiplex=on"), "cpu"):
        pass


def test_ranks_get_its_variables(tmp_path: Path) -> None:
    script = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['SERVICE'])"
    assert launch([sys.executable, "-c", script, str(tmp_path)], 2, variables={"SERVICE": "there"}) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["there", "there"]


def test_the_python_interface_starts_neither_it_nor_engines(configured: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.multiplex.*\n.*start it with `torchspec train`"):
        train(configured(COLOCATED, "pipeline.multiplex=on"), provenance={})
    with pytest.raises(ConfigError, match="has engines that nobody has started"):
        train(configured("pipeline.topology=disaggregated"), provenance={})


# Memory.


def test_how_the_memory_of_a_device_is_divided(configured: Callable[..., RunConfig]) -> None:
    """On an accelerator by halves, unless said, with a reserve that is the trainer's loss."""
    assert engine_fraction(configured(COLOCATED), "cuda") == 0.5
    assert trainer_fraction(configured(COLOCATED), "cuda") == pytest.approx(0.45)
    assert trainer_fraction(configured(COLOCATED, "engine.memory_fraction=0.3"), "cuda") == pytest.approx(0.65)
    assert engine_fraction(configured(COLOCATED), "cpu") is None
    assert trainer_fraction(configured(COLOCATED), "cpu") == 1.0
    assert trainer_fraction(configured(), "cuda") == 1.0


def test_fractions_that_do_not_add_up(configured: Callable[..., RunConfig]) -> None:
    config = configured(COLOCATED, "engine.memory_fraction=0.95")
    accelerator = replace(registry.devices().spec("cpu"), device_type="cuda")
    (problem,) = topology_problems(config, accelerator, registry.backends().spec("vllm"))
    assert problem.field == "engine.memory_fraction"
    assert "leaves the trainer no memory" in problem.message
    (problem,) = topology_problems(config, registry.devices().spec("cpu"), registry.backends().spec("hf"))
    assert "shares a CPU's memory with everybody" in problem.message
