"""Pieces of a training step for which there is more on NVIDIA GPUs than plain torch. Shape letters: C pairs, N draft
vocabulary."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from torchspec.devices.api import (
    Fp8Support,
    FusedOps,
    Scaled,
    TilePairs,
    TileTeacher,
    TileTerms,
    emulated_scaled_mm,
)

log = logging.getLogger(__name__)

_HALF = (torch.float16, torch.bfloat16)

FP8_FROM = (8, 9)
"""The compute capability (Ada) from which tensor cores multiply FP8 matrices."""
ROW_SCALED = frozenset({(8, 9), (9, 0), (10, 0)})
"""Those that PyTorch 2.10 to 2.14 has kernels for with a scale for each row; elsewhere cuBLAS refuses them
(pytorch/pytorch#192707 of 12.0)."""


class CudaOps(FusedOps):
    temporary_bytes = 256 << 20
    loss_bytes = 1 << 30

    def wide_operand(self, x: Tensor) -> Tensor:
        return x if x.is_cuda and x.dtype in _HALF else super().wide_operand(x)

    def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """cuBLAS reads halves and writes the fp32 in which it sums them anyway. Not differentiable then."""
        if not (a.is_cuda and a.dtype in _HALF and a.dtype == b.dtype):
            return super().wide_mm(a, b, out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)

    @functools.cached_property
    def fp8(self) -> Fp8Support:
        capability = torch.cuda.get_device_capability()
        if capability >= FP8_FROM:
            return Fp8Support(kind="native")
        have, want = (".".join(map(str, each)) for each in (capability, FP8_FROM))
        reason = f"a GPU of compute capability {have} multiplies no FP8 matrices, one of {want} does"
        return Fp8Support(kind="emulated", reason=reason)

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        """By `torch._scaled_mm`, with sums kept in fp32 (no fast accumulation)."""
        if self.fp8.kind != "native":
            return emulated_scaled_mm(a, b, dtype)
        return hardware_scaled_mm(a, b, dtype, row_scaled=torch.cuda.get_device_capability() in ROW_SCALED)

    def distillation_tile(
        self, logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool
    ) -> TileTerms:
        """By the Triton kernel for fp32 logits if Triton is installed, else in plain torch."""
        contiguous_rows = logits_CN.stride(1) == 1
        if logits_CN.dtype != torch.float32 or not contiguous_rows or self._kernel is None:
            return super().distillation_tile(logits_CN, teacher, pairs, with_grad=with_grad)
        return self._kernel(logits_CN, teacher, pairs, with_grad=with_grad)

    @functools.cached_property
    def _kernel(self) -> Callable[..., TileTerms] | None:
        """The kernel's wrapper. A Triton that is installed but does not load is named, never hidden."""
        if importlib.util.find_spec("triton") is None:
            log.info("Triton is not installed: the distillation loss runs in plain torch")
            return None
        try:
            module = importlib.import_module("torchspec.devices.cuda._distillation_triton")
        except (ImportError, OSError) as error:
            log.warning("Triton is installed but does not load; the distillation loss runs in plain torch: %s", error)
            return None
        kernel: Callable[..., TileTerms] = module.distillation_tile
        return kernel


def hardware_scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype, *, row_scaled: bool) -> Tensor:
    """`FusedOps.scaled_mm` with the kernels that PyTorch has.

    Those with a scale for each row write bf16 alone, on some GPUs. Elsewhere the products are made with scales of 1 and
    scaled afterwards, which is as exact: scales are powers of two.
    """
    if not a.values.numel() or not b.values.numel():
        return torch.zeros(len(a.values), len(b.values), dtype=dtype, device=a.values.device)
    if a.scale.numel() == b.scale.numel() == 1:
        return _multiplied(a.values, b.values, a.scale, b.scale, dtype)
    rows, columns = (each.scale.expand(len(each.values), 1).contiguous() for each in (a, b))
    if row_scaled and dtype == torch.bfloat16:
        return _multiplied(a.values, b.values, rows, columns.T, dtype)
    one = torch.ones(1, 1, device=a.values.device)
    return _multiplied(a.values, b.values, one, one, dtype).mul_(rows.to(dtype)).mul_(columns.T.to(dtype))


def _multiplied(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    product: Tensor = torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=False)
    return product
