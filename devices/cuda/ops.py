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

from torchspec.devices.api import FusedOps, TilePairs, TileTeacher, TileTerms

log = logging.getLogger(__name__)

_HALF = (torch.float16, torch.bfloat16)


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
