"""A program that uses torchspec, for type checkers alone: `mypy --strict ci/consumer.py` beside an installed wheel.

What must be refused is marked as ignored: an ignore without an error is an error, and so is anything that turned `Any`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor

import torchspec
from torchspec.backends.api import EngineSpec, TargetSpec, read_target_spec
from torchspec.core.objectives import LogProbabilities, token_log_probabilities
from torchspec.devices.api import DeviceSpec, FusedOps, MaskSpec


def train() -> None:
    outcome = torchspec.train({"target": {"path": "DIR"}, "output": "runs/mine"})
    assert_type(outcome.acceptance_length, float | None)
    assert_type(outcome.draft, Path | None)
    torchspec.train(3)  # type: ignore[arg-type]


def follow(trainer: torchspec.OnlineDraftTrainer, tokens: Tensor, states: dict[int, Tensor], last: Tensor) -> None:
    trainer.add(tokens, [True], states, last, norm_state="pre_norm")
    trainer.add(tokens, [True], states, last, norm_state="none")  # type: ignore[arg-type]
    assert_type(trainer.step(), dict[str, Any] | None)
    trainer.stop()  # type: ignore[attr-defined]


def measure(ops: FusedOps) -> None:
    found = token_log_probabilities(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), ops, entropy=True)
    assert_type(found, LogProbabilities)
    assert_type(found.entropy_N, Tensor | None)


def describe(device: DeviceSpec, engine: EngineSpec) -> MaskSpec:
    assert_type(read_target_spec(Path("DIR")), TargetSpec)
    assert_type((device.name, engine.name), tuple[str, str])
    return MaskSpec.causal()
