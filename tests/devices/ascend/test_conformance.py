"""The whole adapter over its emulation, registered as a plug-in and put through the contract's own checks: operators,
collectives of two processes with HCCL's limits, and training runs of two processes against the CPU's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchspec.core.conformance.apart import run_apart
from torchspec.devices.conformance import CHECKS

pytestmark = pytest.mark.slow

START_SECONDS = 180.0


@pytest.fixture(autouse=True)
def plugged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with the entry point, on the path of every process that is started from here."""
    info = tmp_path / "npu_emulated-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: npu_emulated\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchspec.devices]\nnpu_emulated = npu_emulated:SPEC\n")
    path = [str(tmp_path), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.mark.parametrize(
    ("topic", "count"), [("ops:", 5), ("collectives:", 7), ("training: two ranks share sequences", 2)]
)
def test_the_adapter_keeps_the_contract(topic: str, count: int) -> None:
    chosen = [check for check in CHECKS if check.name.startswith(topic)]
    assert len(chosen) >= count
    results = list(run_apart("torchspec.devices.conformance", ["npu_emulated"], chosen, start_seconds=START_SECONDS))
    expected = [(each.name, "SKIP" if "FP8" in each.name else "PASS") for each in chosen]  # FP8 is declared absent
    assert [(each.check, each.status) for each in results] == expected, results
