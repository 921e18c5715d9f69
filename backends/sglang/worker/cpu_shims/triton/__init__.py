"""SGLang defines its triton kernels when it is imported, on every device. Nothing on the CPU launches one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn

from torchspec_absent import AbsentClass, stand_in  # type: ignore[import-not-found]

__version__ = "3.8.0"


class Kernel:
    """A kernel that was defined and can't run."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.name = function.__qualname__
        functools.update_wrapper(self, function)

    def __getitem__(self, _: object) -> NoReturn:
        raise RuntimeError(f"triton is not installed here, and SGLang wants to launch {self.name}")

    __call__ = __getitem__


class Config(AbsentClass):  # type: ignore[misc]
    pass


def jit(function: Callable[..., object] | None = None, **_: object) -> object:
    return Kernel if function is None else Kernel(function)


def _unchanged(*_: object, **__: object) -> Callable[[object], object]:
    return lambda kernel: kernel


autotune = heuristics = _unchanged


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


stand_in(__name__)
