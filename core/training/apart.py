"""A training inside somebody else's process: what it sets is its own, and what it finds set is not its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from torchspec.core.interfaces.device import Runtime
from torchspec.core.training.random_state import capture_state, restore_state

_PROCESS = threading.RLock()
"""Who holds it may set what belongs to the process: random states and the default dtype."""


@contextmanager
def plain_modes(kinds: Iterable[str] = ("cpu",)) -> Iterator[None]:
    """Whatever mode the caller is in, inside gradients are recorded (no inference_mode, no no_grad), autocast is off on
    these kinds of device, and tensors are made in float32 on the CPU where no dtype or device is named. One thread of
    the process is inside at a time."""
    with _PROCESS, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for kind in set(kinds):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


class Apart:
    """Random states of one training, and blocks in which it computes: in `plain_modes`, with its device the current one
    and with random numbers that continue its own. Afterwards all of it is as it was.

    Random states and the default dtype belong to the process: trainings in several threads wait for each other, and who
    draws in another thread meanwhile draws from the training's.
    """

    def __init__(self, runtime: Runtime, device: torch.device, seed: int) -> None:
        self._runtime, self._device = runtime, device
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """What is drawn from now on. No generator of the process is touched."""
        self._random = {
            "cpu": torch.Generator("cpu").manual_seed(seed).get_state(),
            "device": torch.Generator(self._device).manual_seed(seed).get_state(),
        }

    @property
    def random(self) -> dict[str, Tensor]:
        """Copies of the states, uint8 on the CPU."""
        return {name: state.clone() for name, state in self._random.items()}

    @random.setter
    def random(self, states: dict[str, Tensor]) -> None:
        self._random = {name: state.clone() for name, state in states.items()}

    @contextmanager
    def inside(self, *, training: bool = True) -> Iterator[None]:
        """What is not `training`, or fails, leaves the training's own random numbers where they were, too."""
        kind = self._device.type
        current = nullcontext() if kind == "cpu" else torch.get_device_module(self._device).device(self._device)
        with plain_modes(("cpu", kind)), current:
            before = capture_state(self._runtime)
            restore_state(self._runtime, self._random)
            try:
                yield
                if training:
                    self._random = capture_state(self._runtime)
            finally:
                restore_state(self._runtime, before)
