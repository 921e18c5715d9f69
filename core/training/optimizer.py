"""AdamW on the fp32 shards, and its state as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from torchspec.core.config.schema import TrainConfig


def build_optimizer(draft: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW (1711.05101) with decay on matrices only: norms and biases have no direction to shrink towards.

    The state is created here and not at the first step, so that a checkpoint holds the same tensors at any time and
    loading writes into them.
    """
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(draft: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Every state tensor as `<parameter name>.<state name>`; writing into them changes the optimizer."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in draft.named_parameters()
        if parameter.requires_grad
        for key, tensor in optimizer.state[parameter].items()
    }
