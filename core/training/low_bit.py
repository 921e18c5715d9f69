"""AdamW with moments of 8 bits a value (2110.02861: blocks of 256 and a dynamic map), by torchao, which is an extra.

Moments of a rank's shard that has fewer than 4,096 values, or no multiple of 256, stay fp32. A checkpoint holds all of
them in fp32, as AdamW's does: any number of ranks, and either optimizer, goes on from it. A block that is quantised
anew is not always the same (the map has 1 and not -1), so a rank stores its own codes too, with which the same number
of ranks goes on to the last bit.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchspec.core.config.schema import TrainConfig
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.quiet import known_noise_hidden
from torchspec.core.training.sharding import local

CODES = ("codes", "scale")
BLOCK, SMALLEST = 256, 4096
WORTH_COMPILING = 1 << 20

logger = logging.getLogger(__name__)


def check_low_bit() -> None:
    """Raise ConfigError when torchao is not installed: before the run, not in it."""
    if importlib.util.find_spec("torchao") is None:
        message, remedy = "torchao is not installed", 'pip install "torchspec[lowbit]"'
        raise ConfigError([Problem(field="train.optimizer", value="adamw8bit", message=message, remedy=remedy)])


def adamw_8bit(groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """The state is there from the start, as that of `build_optimizer`."""
    with known_noise_hidden():
        from torchao.optim import AdamW8bit

    class Stepping(AdamW8bit):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance(stance), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
                return super().step(closure)

    optimizer = Stepping(groups, lr=config.lr, betas=config.betas, block_size=BLOCK)
    stance = _stance([local(parameter) for group in groups for parameter in group["params"]])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": optimizer._new_buffer(parameter, True),
                "exp_avg_sq": optimizer._new_buffer(parameter, False),
            }
    return optimizer


def _stance(shards: Sequence[Tensor]) -> str:
    """torchao compiles the update: fused, it needs two tensors' worth of memory, else thirteen and many times longer.

    Small shards in the host's memory are updated sooner than that is compiled; and a host may lack the compiler.
    """
    if any(shard.device.type != "cpu" for shard in shards):
        return "default"
    largest = max(shard.numel() for shard in shards)
    if largest < WORTH_COMPILING:
        return "force_eager"
    if shutil.which("g++") is None:
        logger.warning(
            "there is no g++ to compile the update of train.optimizer=adamw8bit: it takes many times as long, and the "
            "memory of %.1f GB more",
            13 * 4 * largest / 1e9,
        )
        return "force_eager"
    return "default"


def state_bytes(values: int) -> int:
    """Of one moment of a shard with so many values: a code each, a scale for each block, and the map."""
    if values < SMALLEST or values % BLOCK:
        return 4 * values
    return values + 4 * (values // BLOCK) + 4 * 256


def in_floats(state: Tensor) -> Tensor:
    """A copy in fp32, sharded alike, of a moment that is held in codes; any other tensor itself."""
    inner = local(state)
    if not _is_coded(inner):
        return state
    values = inner.dequantize().float()
    if not isinstance(state, DTensor):
        return values
    mesh, placements, shape, stride = state.device_mesh, state.placements, state.shape, state.stride()
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)


def codes_of(state: Tensor) -> dict[str, Tensor]:
    """The tensors that hold this rank's part, by name; none when it is not held in codes."""
    inner = local(state)
    return {name: getattr(inner, name) for name in CODES} if _is_coded(inner) else {}


def fill(state: Tensor, values: Tensor, codes: dict[str, Tensor]) -> None:
    """Write `values` (see `in_floats`) into a moment, or the codes that it had when they are known and fit."""
    held = codes_of(state)
    if held and all(name in codes and codes[name].shape == tensor.shape for name, tensor in held.items()):
        for name, tensor in held.items():
            tensor.copy_(codes[name])
    elif values is not state:
        local(state).copy_(local(values))


def _is_coded(inner: Tensor) -> bool:
    return all(hasattr(inner, name) for name in CODES)  # torchao's class; to name it here would import it
