"""What the CPU adds to the pieces of a training step in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.devices.api import Fp8Support, FusedOps, Scaled, emulated_scaled_mm


class CpuOps(FusedOps):
    """PyTorch has scaled products for CPUs as well, but what they round in between depends on the CPU; these don't."""

    @property
    def fp8(self) -> Fp8Support:
        return Fp8Support(kind="emulated", reason="CPUs multiply no FP8 matrices")

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        return emulated_scaled_mm(a, b, dtype)
