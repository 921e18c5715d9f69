"""Loading one rank's part of a target: only its slices of the checkpoint are read.

transformers can split a model while it loads it, but only over all ranks of the world, in an order and on devices it
finds itself, and through arguments that change from release to release. Here it loads a narrower model from tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from torchspec.backends.api import TargetSpec
from torchspec.backends.hf.dequantised import Dequantised
from torchspec.backends.hf.split_forward import join_ranks
from torchspec.backends.hf.split_plan import SplitPlan, bounds, skeleton, split_plan
from torchspec.core.models.target_weights import TargetWeights


def load_part(
    spec: TargetSpec, weights: TargetWeights, mesh: DeviceMesh, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """This rank's part on the CPU, joined to the others', and what transformers found missing or misshapen.

    Raises TargetError when the target cannot be split over so many ranks. Nothing is communicated.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    plan = split_plan(spec)
    plan.check_size(size)
    config = plan.narrow(rank, size)
    loaded: Any = type(skeleton(config, spec)).from_pretrained(
        None,
        config=config,
        state_dict=read_part(weights, plan, rank, size, dtype),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    join_ranks(model, plan, mesh)
    return model, report


def read_part(
    weights: TargetWeights, plan: SplitPlan, rank: int, size: int, dtype: torch.dtype
) -> dict[str, Tensor | Dequantised]:
    """The checkpoint's tensors as this rank of `size` holds them, in the dtype they are stored in, quantised ones in
    `dtype`."""
    part: dict[str, Tensor | Dequantised] = {}
    for name in weights.quantised:
        side = plan.side(name)
        kept = None if side is None else bounds(weights.shape(name)[side], rank, size)
        rows, columns = (kept, None) if side == 0 else (None, kept)
        part[name] = Dequantised(weights=weights, name=name, dtype=dtype, rows=rows, columns=columns)
    names_of: dict[Path, list[str]] = {}
    for name, file in weights.files.items():
        if name not in part:
            names_of.setdefault(file, []).append(name)
    for file, names in names_of.items():
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in names:
                side = plan.side(name)
                if side is None:
                    part[name] = opened.get_tensor(name)
                else:
                    stored = opened.get_slice(name)
                    start, end = bounds(stored.get_shape()[side], rank, size)
                    # Columns of a file come as a view that would keep all of it in use.
                    part[name] = stored[start:end] if side == 0 else stored[:, start:end].contiguous()
                module, _, kind = name.rpartition(".")
                if rank > 0 and kind == "bias" and plan.sums(module):
                    part[name] = torch.zeros_like(opened.get_tensor(name))  # the sum over ranks must contain it once
    return part
