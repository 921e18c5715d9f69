"""Binding, memory and random state of every device that can run here."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from torchspec.core.interfaces.device import Runtime
from torchspec.core.registry import load_device


@pytest.fixture
def runtime(device_name: str) -> Runtime:
    return load_device(device_name).runtime


FAULTS = """
import resource, torch
from torchspec.core.registry import load_device
load_device("cpu")
def touch():
    for _ in range(5):
        held = [torch.empty(28 << 20, dtype=torch.uint8).fill_(1) for _ in range(10)]
        del held
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told to keep memory")
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise() -> None:
    pages = 5 * 10 * (28 << 20) // resource.getpagesize()
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    for environment, few in ((own, True), (own | {"MALLOC_MMAP_THRESHOLD_": "131072"}, False)):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
        )
        assert (int(done.stdout) < pages / 4) is few


def test_binding(runtime: Runtime) -> None:
    device = runtime.bind(0)
    assert device.type == runtime.device_type
    assert torch.ones(2, device=device).device == device
    assert runtime.device_count() >= 1


def test_memory_sees_a_large_tensor_and_the_peak_can_be_reset(runtime: Runtime, device_name: str) -> None:
    device = runtime.bind(0)
    size = 1280 << 20  # more than a CPU's malloc keeps of what other tests freed
    runtime.reset_peak_memory()
    before = runtime.memory()
    assert before.total > 0
    tensor = torch.ones(size, dtype=torch.uint8, device=device)
    runtime.synchronize()
    held = runtime.memory()
    assert held.allocated - before.allocated > 0.9 * size
    assert held.peak >= held.allocated
    del tensor
    after = runtime.memory()
    assert held.allocated - after.allocated > 0.9 * size
    assert after.peak - after.allocated > 0.9 * size
    runtime.reset_peak_memory()
    if runtime.memory().peak == after.peak and device_name == "cpu":
        pytest.skip("this system cannot reset the peak of the resident set")
    assert runtime.memory().peak < after.peak - 0.5 * size


def test_seeding_and_restoring_the_random_state(runtime: Runtime) -> None:
    device = runtime.bind(0)
    runtime.manual_seed(11)
    state = runtime.rng_state()
    assert (state.dtype, state.device.type) == (torch.uint8, "cpu")
    first, host = torch.rand(4, device=device), torch.rand(4)
    runtime.manual_seed(11)
    assert torch.equal(torch.rand(4, device=device), first)
    runtime.manual_seed(11)
    if device.type != "cpu":
        assert torch.equal(torch.rand(4), host)
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device), first)
