"""Device memory that other processes on the same GPU can open, as torch.multiprocessing shares CUDA tensors.

Written after PyTorch's torch/multiprocessing/reductions.py and torch/csrc/StorageSharing.cpp. What was run: the handles
and the allocator's settings, and a comparison of the calls with the installed reductions.py. What was not run: any of
it on a GPU. tests/devices/test_ipc.py does where one is present (marker `gpu`).

Where this differs from torch.multiprocessing:

- One buffer is opened many times. PyTorch's count of readers starts at one and falls with each that closes, below zero
  and round to a huge number, whereupon the memory is never freed. Here readers are given no counter, and the exporter
  takes its own count back when it releases the buffer. Who still reads is the caller's to know: a reader closes first.
- PyTorch's event says when the memory was ready as it was first shared. Here each hand-over is complete before it is
  told: the writer waits for its stream (`synchronize`) before it publishes, the reader before it lets go.
- Memory of expandable segments cannot be shared this way. For the moment of the allocation they are switched off,
  which PyTorch's allocator heeds by giving out a segment of the ordinary kind; what was configured then holds again.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torchspec.devices.api import UnavailableError

_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*True", re.IGNORECASE)
_NO_COUNTER = b"/torchspec-has-no-counter"  # PyTorch ignores one that is not there: its exporter may have ended


class CudaSharedMemory:
    """Implements `SharedMemory` on this process's current device. A handle is JSON.

    The exporter outlives its readers' use: each opens a buffer, copies out of it, synchronises and lets go.
    """

    device_type = "cuda"
    reads_in_place = False

    def __init__(self) -> None:
        self._counters: dict[str, tuple[torch.UntypedStorage, bytes, int]] = {}

    def allocate(self, nbytes: int, directory: Path) -> tuple[Tensor, str]:
        try:
            with _ordinary_segments():
                memory_U = torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", _current()))
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the GPU has no {nbytes / 1e6:.1f} MB left") from error
        storage = memory_U.untyped_storage()
        # PyTorch 2.10 to 2.13: index, allocation, size, offset, counter's file and place, event and whether to wait.
        device, allocation, size, offset, counter, place, _, _ = storage._share_cuda_()  # type: ignore[no-untyped-call]
        handle = packed(_uuid(device), allocation, size, offset)
        self._counters[handle] = (storage, counter, place)
        return memory_U, handle

    def open(self, handle: str) -> Tensor:
        uuid, allocation, size, offset = unpacked(handle)
        index = next((each for each in range(torch.cuda.device_count()) if _uuid(each) == uuid), None)
        if index is None:
            raise UnavailableError(
                f"the features lie on the GPU {uuid}, which this process cannot see\n"
                "    remedy: make it visible here, or hand features over in the host's memory"
            )
        torch.cuda.init()  # type: ignore[no-untyped-call]  # the next call does not
        storage = torch.UntypedStorage._new_shared_cuda(index, allocation, size, offset, _NO_COUNTER, 0, b"", False)
        return torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index)).set_(storage)

    def release(self, handle: str) -> None:
        storage, counter, place = self._counters.pop(handle)
        storage._release_ipc_counter_cuda(counter, place)

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()


def packed(uuid: str, allocation: bytes, size: int, offset: int) -> str:
    """The handle's text. `allocation` is the CUDA allocation's handle, `offset` the storage's place in it."""
    allocation_text = base64.b64encode(allocation).decode()
    return json.dumps({"gpu": uuid, "allocation": allocation_text, "size": size, "offset": offset})


def unpacked(handle: str) -> tuple[str, bytes, int, int]:
    facts = json.loads(handle)
    return facts["gpu"], base64.b64decode(facts["allocation"], validate=True), facts["size"], facts["offset"]


def without_expandable_segments(settings: str) -> str:
    """The allocator's settings in PyTorch's syntax, with ordinary segments and all else as it was."""
    return _EXPANDABLE.sub("expandable_segments:False", settings)


_settings_lock = threading.Lock()


@contextmanager
def _ordinary_segments() -> Iterator[None]:
    with _settings_lock:
        configured = torch._C._accelerator_getAllocatorSettings()
        if not _EXPANDABLE.search(configured):
            yield
            return
        torch._C._accelerator_setAllocatorSettings(without_expandable_segments(configured))
        try:
            yield
        finally:
            torch._C._accelerator_setAllocatorSettings(configured)


def _current() -> int:
    return torch.cuda.current_device()


def _uuid(index: int) -> str:
    """The same in every process, unlike the index, which depends on the GPUs that a process sees."""
    return str(torch.cuda.get_device_properties(index).uuid)
