"""A policy, what it writes and its hidden states; loaded by path, in tests and in the processes they start.

Shape letters: T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchspec.core.pipeline.online import OnlineDraftTrainer

ALGORITHMS: dict[str, dict[str, Any]] = {
    "eagle3": {"unroll": 3},
    "dflash": {"block_size": 4, "num_layers": 1, "num_anchors": 3},
}
TRAIN = {"batch_size": 3, "micro_batch_size": 2, "lr": 0.01, "warmup_steps": 1, "clip_norm": 0.5}


def load_policy(path: Path | str) -> PreTrainedModel:
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).eval()
    return policy


def make(target: Any, algorithm: str = "eagle3", **more: Any) -> OnlineDraftTrainer:
    settings = {"draft": ALGORITHMS.get(algorithm), "train": TRAIN, "device": "cpu", "seed": 5, **more}
    return OnlineDraftTrainer(target, algorithm=algorithm, **settings)


def sample(policy: PreTrainedModel, trainer: OnlineDraftTrainer, number: int, **more: Any) -> dict[str, Any]:
    """The arguments of `add`. Lengths differ."""
    generator = torch.Generator().manual_seed(number)
    ids_T = torch.randint(3, policy.config.vocab_size, (10 + 3 * (number % 5),), generator=generator)
    with torch.no_grad():
        found = policy.model(ids_T[None], output_hidden_states=True, use_cache=False)
    places = zip(trainer.required.tap_layers, trainer.required.hf_hidden_states, strict=True)
    return {
        "tokens": ids_T,
        "loss_mask": torch.arange(ids_T.numel()) > 2,
        "hidden_states": {layer: found.hidden_states[place][0] for layer, place in places},
        "last": found.last_hidden_state[0],
        "norm_state": "post_norm",
        "name": f"s{number}",
        **more,
    }


def figures(row: dict[str, Any] | None) -> dict[str, Any]:
    """What the numbers decide."""
    assert row is not None
    return {name: value for name, value in row.items() if name not in ("step_seconds", "time")}


def losses(trainer: OnlineDraftTrainer, policy: PreTrainedModel, count: int = 6) -> list[dict[str, Any]]:
    """Figures of the steps that so many samples make."""
    for number in range(count):
        trainer.add(**sample(policy, trainer, number))
    return [figures(row) for row in iter(trainer.step, None)]
