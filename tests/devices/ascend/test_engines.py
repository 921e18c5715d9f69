"""How engines for NPUs are reached by configuration, as far as that goes without any: the environment or interpreter
that is looked for, and the command that a worker is started with."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchspec.core import registry
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import EngineOptions, EngineProcess
from torchspec.devices.ascend.runtime import AscendRuntime


class Bound(AscendRuntime):
    """Its tensors lie on the CPU: torch has no NPU here."""

    def bind(self, local_rank: int) -> torch.device:
        return torch.device("cpu")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_for_npus_is_looked_for_and_named(
    engine: str, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHSPEC_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path / "cache"))
    spec = registry.backends().spec(engine)
    missing = registry.available(spec, "npu", EngineProcess())
    assert not missing.ok
    assert f"no environment of {engine} for device npu" in missing.reason
    assert f"torchspec engine install {engine} --device npu" in missing.hint
    cpu = registry.load_device("cpu")
    device = Device(name="npu", runtime=Bound(), communication=cpu.communication, attention=cpu.attention)
    options = EngineOptions(target=tiny_target, device=device, process=EngineProcess(python=Path(sys.executable)))
    assert spec.command is not None
    words = shlex.split(spec.command(replace(options, taps=(1, 2)), 8123))
    assert sys.executable in words
    assert words[words.index("--device") + 1] == "npu"
