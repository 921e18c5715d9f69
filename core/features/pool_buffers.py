"""The buffers of a pool: reused, so that their pages stay mapped in every process, and given up when room is needed."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from torchspec.core.errors import StoreFullError
from torchspec.core.features.pool_holds import forget_the_dead, held
from torchspec.core.interfaces.device import SharedMemory

RECORDS = "records"
_SMALLEST = 1 << 16
_PAGE = 1 << 12
_STEPS = 4
"""Sizes to a power of two: a buffer is at most a quarter larger than what it was made for."""


@dataclass(eq=False, kw_only=True)
class Buffer:
    """`memory_U` is uint8. `generation` is another one at every use; `record` is the name of the file that refers to
    it, None while it is written."""

    number: int
    handle: str
    memory_U: Tensor
    generation: int = 0
    record: str | None = None


class Buffers:
    """Of the pool at `root`, at most `capacity` bytes together. Its owner serialises the calls."""

    def __init__(self, memory: SharedMemory, root: Path, capacity: int) -> None:
        self.memory, self.root, self.capacity = memory, root, capacity // _PAGE * _PAGE
        self._numbers, self._generations = itertools.count(), itertools.count(1)
        self._used: dict[int, Buffer] = {}
        self._free: list[Buffer] = []  # longest unused first

    @property
    def allocated(self) -> int:
        """Bytes, free buffers included."""
        return sum(len(buffer.memory_U) for buffer in [*self._free, *self._used.values()])

    def fits(self, nbytes: int) -> bool:
        """Whether `take` would find room now."""
        self._check(nbytes)
        self._collect(dead_too=True)
        return self._room_for(nbytes) or self._fitting(nbytes) is not None

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least so many bytes, to be written; StoreFullError when there is no room for one."""
        self._check(nbytes)
        self._collect()
        if self._fitting(nbytes) is None and not self._room_for(nbytes):
            self._collect(dead_too=True)
        buffer = self._fitting(nbytes)
        if buffer is not None:
            self._free.remove(buffer)
        else:
            buffer = self._made(nbytes)
        buffer.generation, buffer.record = next(self._generations), None
        self._used[buffer.number] = buffer
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Of a record that did not come to be."""
        self._free.append(self._used.pop(buffer.number))

    def forget(self, record: str) -> None:
        """The file of this name is gone and another will get its name; the earlier one's buffer may still be held."""
        for buffer in self._used.values():
            if buffer.record == record:
                buffer.record = ""

    def close(self) -> None:
        """What is being read is left to those who read it."""
        marked = held(self.root)
        for buffer in [*self._free, *self._used.values()]:
            if buffer.number not in marked:
                self.memory.release(buffer.handle)
        self._free, self._used = [], {}

    def _check(self, nbytes: int) -> None:
        if nbytes > self.capacity:
            raise StoreFullError(
                f"a record of {nbytes / 1e6:.1f} MB is more than the {self.capacity / 1e6:.1f} MB that the feature "
                f"store {self.root} may hold"
            )

    def _collect(self, *, dead_too: bool = False) -> None:
        """Buffers of removed records come back when nobody reads them."""
        if dead_too:
            forget_the_dead(self.root)
        there = set(os.listdir(self.root / RECORDS))
        gone = [each for each in self._used.values() if each.record is not None and each.record not in there]
        if not gone:
            return
        marked = held(self.root)  # after the records: see pool_holds
        self._free += [self._used.pop(each.number) for each in gone if each.number not in marked]

    def _fitting(self, nbytes: int) -> Buffer | None:
        """The smallest free one; one of more than twice the size is kept for what needs it, or given up."""
        fitting = [each for each in self._free if nbytes <= len(each.memory_U) <= 2 * _rounded(nbytes)]
        return min(fitting, key=lambda each: len(each.memory_U), default=None)

    def _in_use(self) -> int:
        return sum(len(each.memory_U) for each in self._used.values())

    def _room_for(self, nbytes: int) -> bool:
        return self._in_use() + nbytes <= self.capacity

    def _made(self, nbytes: int) -> Buffer:
        if not self._room_for(nbytes):
            raise StoreFullError(
                f"no room for a record of {nbytes / 1e6:.1f} MB in the feature store {self.root}: "
                f"{self._in_use() / 1e6:.1f} MB of the {self.capacity / 1e6:.1f} MB it may hold are in use"
            )
        size = min(_rounded(nbytes), self.capacity - self._in_use())
        while self.allocated + size > self.capacity:
            self._give_up(self._free[0])
        while True:
            try:
                memory_U, handle = self.memory.allocate(size, self.root)
                return Buffer(number=next(self._numbers), handle=handle, memory_U=memory_U)
            except MemoryError as error:  # others use the same memory
                if not self._free:
                    raise StoreFullError(f"no room for {size / 1e6:.1f} MB in {self.root}: {error}") from error
                self._give_up(self._free[0])

    def _give_up(self, buffer: Buffer) -> None:
        self._free.remove(buffer)
        self.memory.release(buffer.handle)


def _rounded(nbytes: int) -> int:
    step = max(_SMALLEST, 1 << nbytes.bit_length() - 1) // _STEPS
    return max(_SMALLEST, -(-nbytes // step) * step)
