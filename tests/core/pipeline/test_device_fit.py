"""What a device cannot do is said before any process waits for another, by the plan and by the run alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.device import FusedOps, MemoryStats
from torchspec.core.pipeline import inprocess
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.preflight import check


@pytest.fixture
def plain_device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The only device there is: `count` of it, each for one rank, without bfloat16 or torch.compile."""
    shown = SimpleNamespace(count=2)
    memory = MemoryStats(allocated=0, peak=0, total=0)
    runtime = SimpleNamespace(device_count=lambda: shown.count, memory=lambda: memory)
    loaded: Any = SimpleNamespace(runtime=runtime, ops=FusedOps())
    cpu = registry.devices().spec("cpu")
    spec = replace(cpu, capabilities=cpu.capabilities - {"bf16", "compile", "ranks_share_device"}, load=lambda: loaded)
    monkeypatch.setattr(registry, "devices", lambda: SimpleNamespace(spec=lambda name: spec, names=lambda: ("cpu",)))
    return shown


def test_a_run_is_refused_with_everything_that_does_not_fit(
    make_config: Any, tmp_path: Path, plain_device: SimpleNamespace
) -> None:
    config, provenance = make_config(tmp_path / "run")
    precision = config.precision.model_copy(update={"compute": "bfloat16"})
    optimizer = config.train.model_copy(update={"optimizer": "adamw8bit"})
    asked = config.model_copy(update={"precision": precision, "train": optimizer})
    with pytest.raises(ConfigError) as planned:
        make_plan(asked, provenance, Ranks(all=3, here=3))
    with pytest.raises(ConfigError) as started:
        check(asked, Ranks(all=3, here=3))
    for error in (planned.value, started.value):
        assert [(problem.field, problem.value) for problem in error.problems] == [
            ("precision.compute", "bfloat16"),
            ("train.optimizer", "adamw8bit"),
            ("nproc", 3),
        ]


def test_only_the_ranks_of_this_machine_need_its_devices(
    make_config: Any, tmp_path: Path, plain_device: SimpleNamespace
) -> None:
    config, provenance = make_config(tmp_path / "run")
    assert make_plan(config, provenance, Ranks(all=16, here=2, launched=True)).run["ranks"] == 16
    with pytest.raises(ConfigError, match="only 2 cpu device"):
        check(config, Ranks(all=3, here=3, launched=True))
    plain_device.count = 1
    check(config, Ranks(all=3, here=3, launched=True))  # the launcher showed each rank a device of its own
    with pytest.raises(ConfigError, match="only 1 cpu device"):
        check(config, Ranks(all=3, here=3))


def test_training_asks_before_it_joins_the_other_ranks(
    make_config: Any, tmp_path: Path, plain_device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a launcher the other ranks never come here: a rank that waited for them would wait in vain."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    config, provenance = make_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="only 2 cpu device"):
        inprocess.train(config, provenance=provenance)
    assert not (tmp_path / "run").exists()
