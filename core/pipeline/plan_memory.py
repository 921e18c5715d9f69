"""How much memory a rank will need, part by part, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from torchspec.core.interfaces.algorithm import KEEP_ALL, Algorithm, StepMemory
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_weights import TargetWeights

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one rank and how they come about."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """What decides a rank's memory. `compute` is the draft's precision, `target_dtype` the target's."""

    ranks: int
    micro_batch_tokens: int  # at most
    compute: torch.dtype
    target_dtype: torch.dtype
    memory: StepMemory = KEEP_ALL


def estimate(
    algorithm: Algorithm, draft: nn.Module, target: TargetSpec, weights: TargetWeights, load: Load
) -> list[Part]:
    """Parts that exist at the peak of a step, in the backward pass.

    `draft` may be on the meta device. Activations are those of a text that is supervised throughout, within a
    fifth of what is measured; the loss's own share comes and goes before that peak. Workspace of libraries and
    fragmentation are not in it.
    """
    parameters = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    compute, stored = load.compute.itemsize, load.target_dtype.itemsize
    sharded = f"over {load.ranks} rank(s)"
    shared = parameters * FP32 // load.ranks
    target_elements = sum(prod(weights.shape(name)) for name in weights.files)
    ends = target.vocab_size * target.hidden_size * (1 if target.tie_word_embeddings else 2)
    tokens = load.micro_batch_tokens
    kept = algorithm.kept_values(recompute=load.memory.recompute)
    return [
        Part(name="draft parameters", bytes=shared, how=f"{parameters} x 4 bytes {sharded}"),
        Part(name="optimizer state", bytes=2 * shared, how=f"two moments, fp32, {sharded}"),
        Part(name="gradients", bytes=shared, how=f"fp32 {sharded}"),
        Part(name="gathered parameters", bytes=parameters * compute, how="the whole draft in its compute precision"),
        Part(name="gradients before reduction", bytes=parameters * FP32, how="the whole draft, fp32"),
        Part(name="target model", bytes=target_elements * stored, how=f"{target_elements} x {stored} bytes"),
        Part(name="target embedding and head", bytes=ends * stored, how="the trainer's own copy"),
        Part(
            name="features",
            bytes=tokens * (len(algorithm.taps) + 1) * target.hidden_size * stored,
            how=f"{tokens} tokens x ({len(algorithm.taps)} taps + last) x {target.hidden_size}",
        ),
        Part(
            name="activations",
            bytes=int(tokens * kept * compute),
            how=f"{tokens} tokens x {kept:g} values" + (", the rest made again" if load.memory.recompute else ""),
        ),
    ]
