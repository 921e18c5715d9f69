"""What a device cannot do is said before any process waits for another, by the plan and by the run alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.device import DeviceSpec
from torchspec.core.pipeline import inprocess
from torchspec.core.pipeline.plan import make_plan


@pytest.fixture
def plain_device(monkeypatch: pytest.MonkeyPatch) -> DeviceSpec:
    """The only device there is: one of it, for one rank, without bfloat16."""
    loaded: Any = SimpleNamespace(runtime=SimpleNamespace(device_count=lambda: 1))
    cpu = registry.devices().spec("cpu")
    spec = replace(cpu, capabilities=cpu.capabilities - {"bf16", "ranks_share_device"}, load=lambda: loaded)
    monkeypatch.setattr(registry, "devices", lambda: SimpleNamespace(spec=lambda name: spec, names=lambda: ("cpu",)))
    return spec


def test_a_run_is_refused_with_everything_that_does_not_fit(
    make_config: Any, tmp_path: Path, plain_device: DeviceSpec
) -> None:
    config, provenance = make_config(tmp_path / "run")
    asked = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "bfloat16"})})
    with pytest.raises(ConfigError) as planned:
        make_plan(asked, provenance, ranks=2)
    with pytest.raises(ConfigError) as started:
        inprocess.check_fit(asked, 2)
    for error in (planned.value, started.value):
        assert [(p.field, p.value) for p in error.problems] == [("precision.compute", "bfloat16"), ("nproc", 2)]
    inprocess.check_fit(config, 1)


def test_training_asks_before_it_joins_the_other_ranks(
    make_config: Any, tmp_path: Path, plain_device: DeviceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a launcher the other ranks never come here: a rank that waited for them would wait in vain."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    config, provenance = make_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="only 1 cpu device"):
        inprocess.train(config, provenance=provenance)
    assert not (tmp_path / "run").exists()
