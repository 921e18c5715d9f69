"""A draft of blocks on a tiny target, with features made up: everything but the target's layers is real."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core import registry
from torchspec.core.algorithms.blocks.algorithm import BlockAlgorithm
from torchspec.core.algorithms.blocks.batch import Batch, build_batch
from torchspec.core.algorithms.blocks.body import BlockDraft
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import KEEP_ALL, START, Moment, StepMemory, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec


@dataclass(frozen=True, kw_only=True)
class World:
    """An algorithm, its draft and the target's head, in one precision."""

    algorithm: BlockAlgorithm
    draft: BlockDraft
    head: TargetHead
    device: Device

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.fc.weight.dtype

    def features(self, ids_T: Tensor, seed: int = 0, norm_state: NormState = "pre_norm") -> Features:
        generator = torch.Generator().manual_seed(seed)
        size, taps = self.algorithm.geometry.target_hidden_size, self.algorithm.taps

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        return Features(
            input_ids_T=ids_T,
            taps_TNH=random(len(ids_T), len(taps), size),
            last_TH=2 * random(len(ids_T), size),
            tap_layers=taps,
            norm_state=norm_state,
        )

    def tokens(self, length: int, seed: int = 0) -> Tensor:
        vocabulary = self.algorithm.geometry.vocab_size
        return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))

    def batch(self, rows: FeatureRows, moment: Moment = START, loss_bytes: int = 1) -> Batch:
        return build_batch(rows, self.algorithm.plan(self.head, loss_bytes), moment)

    def step(self, rows: FeatureRows, moment: Moment = START, memory: StepMemory = KEEP_ALL) -> StepResult:
        return self.algorithm.step(self.draft, self.head, rows, self.device, memory, moment)

    def gradients(
        self, rows: Sequence[FeatureRows], moments: Sequence[Moment], memory: StepMemory = KEEP_ALL
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(sums, gradients of the summed numerators) of these micro-batches together."""
        self.draft.zero_grad()
        sums: dict[str, Tensor] = {}
        for part, moment in zip(rows, moments, strict=True):
            result = self.step(part, moment, memory)
            result.numerator.backward()
            for name, value in result.sums.items():
                sums[name] = sums[name] + value if name in sums else value
        grads = {}
        for name, parameter in self.draft.named_parameters():
            assert parameter.grad is not None, name
            grads[name] = parameter.grad.clone()
        return sums, grads


@pytest.fixture(scope="session")
def cpu() -> Device:
    return registry.load_device("cpu")


@pytest.fixture
def make_world(tiny_llama: Path, tmp_path: Path, cpu: Device) -> Callable[..., World]:
    """make_world(kind, dtype=..., draft_config={...}, **options); `draft_config` becomes the file of options.config."""

    def make(
        kind: str = "dflash",
        dtype: torch.dtype = torch.float64,
        draft_config: dict[str, Any] | None = None,
        ids_N: Tensor | None = None,
        **options: Any,
    ) -> World:
        if draft_config is not None:
            path = tmp_path / "draft.json"
            path.write_text(json.dumps(draft_config))
            options["config"] = path
        spec, target = registry.algorithms().spec(kind), read_target_spec(tiny_llama)
        vocabulary = VocabularyMap.identity(target.vocab_size)
        if ids_N is not None:
            vocabulary = VocabularyMap(ids_N=ids_N, target_size=target.vocab_size)
        defaults = {"vocab_size": vocabulary.size, "block_size": 4, "num_layers": 2}
        algorithm = spec.create(spec.options(**(defaults | options)), target)
        head = load_target_head(tiny_llama, dtype=dtype, device=torch.device("cpu"))
        torch.manual_seed(0)
        draft = algorithm.build_draft(vocabulary, head)
        with torch.no_grad():  # norm weights of one would hide a norm applied with the wrong weight
            for name, parameter in draft.named_parameters():
                if "norm" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        return World(algorithm=algorithm, draft=draft.to(dtype), head=head, device=cpu)  # type: ignore[arg-type]

    return make
