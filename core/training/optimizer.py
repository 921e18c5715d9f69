"""AdamW on the fp32 shards, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from torchspec.core.config.schema import TrainConfig
from torchspec.core.training import low_bit


def build_optimizer(draft: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW (1711.05101) with decay on matrices only: norms and biases have no direction to shrink towards.

    The state is created here and not at the first step, so that a checkpoint holds the same tensors at any time and
    loading writes into them.
    """
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw8bit":
        return low_bit.adamw_8bit(groups, config)
    optimizer = AdamW(groups, lr=config.lr, betas=config.betas)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # that of a compiled update
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(draft: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every state tensor in fp32 as `<parameter name>.<state name>`. What it is held in otherwise is copied."""
    return {name: low_bit.in_floats(tensor) for name, tensor in _states(draft, optimizer)}


def optimizer_codes(draft: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What this rank alone holds of state that is not held in fp32, as `<parameter name>.<state name>.<tensor>`."""
    held = ((name, low_bit.codes_of(tensor)) for name, tensor in _states(draft, optimizer))
    return {f"{name}.{part}": tensor for name, codes in held for part, tensor in codes.items()}


def fill_optimizer(
    draft: nn.Module, optimizer: Optimizer, values: Mapping[str, Tensor], codes: Mapping[str, Tensor]
) -> None:
    """Write back what `optimizer_tensors` and `optimizer_codes` gave; without codes of this rank the values count."""
    for name, tensor in _states(draft, optimizer):
        mine = {part: codes[f"{name}.{part}"] for part in low_bit.CODES if f"{name}.{part}" in codes}
        low_bit.fill(tensor, values[name], mine)


def _states(draft: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            for key, tensor in optimizer.state[parameter].items():
                yield f"{name}.{key}", tensor
