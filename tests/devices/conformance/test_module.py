"""What is missing of a device's module is named, all of it at once, and only what somebody will ask for."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from torchspec.core.conformance.checks import perform
from torchspec.devices.api import MemoryStats
from torchspec.devices.conformance import subject_of
from torchspec.devices.conformance.module import MODULE, lacking
from torchspec.devices.parts import TorchRuntime


class OwnMemory(TorchRuntime):
    def memory(self) -> MemoryStats:
        return MemoryStats(allocated=0, peak=0, total=0)


def without(*names: str) -> SimpleNamespace:
    """torch.cuda, whose names are there without a GPU, but for these."""
    return SimpleNamespace(**{name: value for name, value in vars(torch.cuda).items() if name not in names})


def test_everything_missing_is_named_with_who_asks_for_it() -> None:
    runtime = TorchRuntime("cuda")
    assert lacking(runtime, torch.cuda) == {}
    gone = without("manual_seed_all", "is_initialized", "Stream", "memory_allocated")
    assert lacking(runtime, gone) == {
        "manual_seed_all": ["torch.manual_seed"],
        "is_initialized": ["DeviceMesh"],
        "Stream": ["FSDP2", "TorchRuntime.upload"],
        "memory_allocated": ["TorchRuntime.memory"],
    }


def test_a_method_of_the_adapters_own_asks_for_nothing() -> None:
    gone = without("memory_allocated", "mem_get_info")
    assert lacking(OwnMemory("cuda"), gone) == {}
    assert set(lacking(TorchRuntime("cuda"), gone)) == {"memory_allocated", "mem_get_info"}


def test_nothing_is_asked_of_the_host() -> None:
    (check,) = MODULE
    assert perform(check, subject_of("cpu")).status == "PASS"
