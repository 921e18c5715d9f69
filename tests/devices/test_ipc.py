"""Memory that other processes can open, for every device that can run here; and the calls of those that cannot."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

from torchspec.core.registry import load_device
from torchspec.devices.cpu.ipc import CpuSharedMemory
from torchspec.devices.cuda import ipc

READER = """
import sys
from torchspec.core.registry import load_device
device = load_device(sys.argv[1])
device.runtime.bind(0)
for _ in range(3):  # as often as one likes
    opened = device.shared_memory.open(sys.argv[2])
    values = opened.clone()
    device.shared_memory.synchronize()
    del opened
print(len(values), int(values.long().sum()))
"""


def test_another_process_opens_it(device_name: str, tmp_path: Path) -> None:
    memory = load_device(device_name).shared_memory
    assert memory is not None
    assert memory.device_type == device_name
    for _ in range(2):
        held_U, handle = memory.allocate(3 << 20, tmp_path)
        assert handle.isprintable()
        assert (held_U.dtype, held_U.shape, held_U.device.type) == (torch.uint8, (3 << 20,), device_name)
        held_U.fill_(7)
        memory.synchronize()
        command = [sys.executable, "-P", "-c", READER, device_name, handle]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(3 << 20), str(7 * (3 << 20))]
        del held_U
        memory.release(handle)
    assert list(tmp_path.iterdir()) == []


def test_a_released_file_costs_nothing_even_where_it_is_mapped(tmp_path: Path) -> None:
    memory = CpuSharedMemory()
    held_U, handle = memory.allocate(1 << 20, Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path)
    held_U.fill_(1)
    opened_U = memory.open(handle)
    assert int(opened_U.long().sum()) == 1 << 20
    memory.release(handle)
    assert int(opened_U.long().sum()) == 0, "its pages are still there"
    with pytest.raises(FileNotFoundError):
        memory.open(handle)


def test_no_room_is_a_memory_error(tmp_path: Path) -> None:
    with pytest.raises((MemoryError, OSError)):
        CpuSharedMemory().allocate(1 << 60, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_handles_of_cuda_are_text_and_come_back() -> None:
    facts = ("GPU-1234", bytes(range(64)), 1 << 40, 512)
    assert ipc.packed(*facts).isprintable()
    assert ipc.unpacked(ipc.packed(*facts)) == facts
    with pytest.raises(ValueError, match=r"base64|padding"):
        ipc.unpacked(ipc.packed(*facts).replace("AAEC", "A!EC"))


def test_expandable_segments_are_off_for_the_moment_and_all_else_stays() -> None:
    before = torch._C._accelerator_getAllocatorSettings()
    configured = "max_split_size_mb:512,expandable_segments:True,garbage_collection_threshold:0.5"
    try:
        torch._C._accelerator_setAllocatorSettings(configured)
        with ipc._ordinary_segments():
            within = torch._C._accelerator_getAllocatorSettings()
        assert within == configured.replace("True", "False")
        assert torch._C._accelerator_getAllocatorSettings() == configured
    finally:
        torch._C._accelerator_setAllocatorSettings(before)
    assert ipc.without_expandable_segments("expandable_segments : true") == "expandable_segments:False"


def test_torch_shares_memory_by_the_calls_that_are_made() -> None:
    """The order of what `_share_cuda_` gives and `_new_shared_cuda` takes, in the installed torch.multiprocessing."""
    order = [
        "device", "handle", "storage_size_bytes", "storage_offset_bytes", "ref_counter_handle", "ref_counter_offset",
        "event_handle", "event_sync_required",
    ]  # fmt: skip
    given = inspect.getsource(reductions.reduce_tensor).partition(") = storage._share_cuda_()")[0]
    assert [name.strip() for name in given.rpartition("(\n")[2].split(",") if name.strip()] == order
    taken = inspect.getsource(reductions.rebuild_cuda_tensor).partition("storage_cls._new_shared_cuda(")[2]
    names = [name.strip().removeprefix("storage_device") or "device" for name in taken.partition(")")[0].split(",")]
    assert [name.replace("storage_handle", "handle") for name in names if name][: len(order)] == order
    for name in ("_share_cuda_", "_new_shared_cuda", "_release_ipc_counter_cuda"):
        assert hasattr(torch.UntypedStorage, name)
