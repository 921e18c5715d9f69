"""Muon with the matrices of one shape orthogonalised together.

The update is that of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` (Jordan et al., 2024; Liu
et al., 2025, arXiv:2502.16982). A small model has dozens of small matrices, and on a busy CPU the many
short parallel regions of one Newton-Schulz iteration per matrix cost more than the arithmetic.

Shape letters: N matrices, R rows, C columns, R <= C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(update_NRC: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each, roughly: singular values land in about [0.7, 1.2]."""
    x_NRC = update_NRC.bfloat16()
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        poly_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=_B, alpha=_C)
        x_NRC = torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=_A)
    return x_NRC


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


class BatchedMuon(torch.optim.Optimizer):
    """One parameter group per shape; its momentum is one tensor [N, R, C] under the first parameter."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in params:
            shapes.setdefault(tuple(_wide(parameter).shape), []).append(parameter)
        groups = [{"params": members} for members in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter; all must have gradients. ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            members = group["params"]
            grad_NRC = torch.stack([_wide(parameter.grad) for parameter in members])
            state = self.state[members[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad_NRC)
            state["momentum"].lerp_(grad_NRC, 1.0 - group["momentum"])
            update_NRC = orthogonalise(grad_NRC.lerp(state["momentum"], group["momentum"])).float()
            rate = group["lr"] * 0.2 * math.sqrt(grad_NRC.shape[-1])
            for parameter, update in zip(members, update_NRC, strict=True):
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                _wide(parameter).sub_(update, alpha=rate)
