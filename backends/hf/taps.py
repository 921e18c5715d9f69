"""Reading the outputs of decoder layers while the target runs.

Shape letters: B sequences, n rows of the forward pass, N taps, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchspec.backends.hf.target import HfTarget


class TapRecorder:
    """A context in which the outputs of the taps, and of layers in `also`, are recorded; 0-based.

    A hook sees what the layer itself returns, so the last layer's output is the one before the final norm.
    Hooks exist only inside the context: a target without taps runs at full speed.
    """

    def __init__(self, target: HfTarget, taps: Sequence[int], also: Sequence[int] = ()) -> None:
        self.taps = tuple(taps)
        self.outputs: dict[int, Tensor] = {}
        self._layers = {layer: target.layers[layer] for layer in (*taps, *also)}
        self._hidden_size, self._dtype, self._device = target.spec.hidden_size, target.model.dtype, target.device
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> TapRecorder:
        self.outputs.clear()
        self._handles = [module.register_forward_hook(self._hook(layer)) for layer, module in self._layers.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[layer] = output[0] if isinstance(output, tuple) else output

        return record

    def of_row(self, row: int, length: int) -> Tensor:
        """[length, N, H]: the taps of the first `length` rows of one sequence, in the order they were asked for."""
        if not self.taps:
            return torch.empty(length, 0, self._hidden_size, dtype=self._dtype, device=self._device)
        return torch.stack([self.outputs[tap][row, :length] for tap in self.taps], dim=1)

    def of_batch(self, shape_Bn: Sequence[int]) -> Tensor:
        """[B, n, N, H]: the taps of every row."""
        if not self.taps:
            return torch.empty(*shape_Bn, 0, self._hidden_size, dtype=self._dtype, device=self._device)
        return torch.stack([self.outputs[tap] for tap in self.taps], dim=2)
