"""Operators that modules of SGLang name when they are imported, on the way to the processor of Qwen-VL. Nothing that
runs on a processor without AMX calls them: torch would say that they are not implemented."""

from __future__ import annotations

import torch

NAMES = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name in NAMES:
    _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
