"""The adapter under test, loaded and bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.registry import devices, load_device
from torchspec.devices.api import Device, DeviceSpec

# What rounding may do, as ||got - exact|| / ||exact||: inputs are rounded before the exact result is worked out, but
# outputs, probabilities and score gradients are each rounded to 8 bits (4e-3) or 11 (5e-4) inside a kernel; in fp32
# sums of some hundred terms in any order, and exponentials of an accelerator's special functions.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

_SMALL = 0.05
"""Root mean square below which an exact result counts as this large: gradients that cancel have none."""

_OPTIONAL = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`where`: the device that was bound, on which every tensor is made."""

    spec: DeviceSpec
    device: Device
    where: torch.device

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """fp32, and those that the adapter declares."""
        declared = (dtype for name, dtype in _OPTIONAL.items() if name in self.spec.capabilities)
        return (torch.float32, *declared)

    def can_hold_ranks(self, count: int) -> bool:
        return "ranks_share_device" in self.spec.capabilities or self.device.runtime.device_count() >= count


def subject_of(name: str) -> Subject:
    """The registered device of this name; UnavailableError with the cause where it cannot be used."""
    spec = devices().spec(name)
    device = load_device(name)
    return Subject(spec=spec, device=device, where=device.runtime.bind(0))


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal values of one dtype and shape; `wanted` is on the host."""
    return got.dtype == wanted.dtype and torch.equal(got.cpu(), wanted)


class Worst:
    """The largest of many errors, each as a part of what is allowed."""

    def __init__(self) -> None:
        self._part, self._text = -1.0, "nothing compared"

    def compare(self, what: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
        """AssertionError where `got` has another shape, is not finite or is too far away. `exact` is on the host."""
        assert got.shape == exact.shape, f"{what} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        far = got.detach().cpu().to(torch.float64)
        assert bool(far.isfinite().all()), f"{what} is not finite"
        error = float((far - exact).norm() / max(float(exact.norm()), _SMALL * math.sqrt(exact.numel()), _SMALL))
        assert error <= tolerance, f"{what} is off by {error:.2g} of its norm; {tolerance:.0e} is allowed"
        if error / tolerance > self._part:
            self._part, self._text = error / tolerance, f"at most {error:.1e} of {tolerance:.0e} allowed ({what})"

    def __str__(self) -> str:
        return self._text
