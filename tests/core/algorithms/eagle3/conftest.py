"""A draft on a tiny target, with features made up: everything but the target's layers is real."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.batch import Batch, Plan, build_batch
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.algorithms.eagle31.algorithm import Eagle31
from torchspec.core.algorithms.eagle31.options import Eagle31Options
from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import KEEP_ALL, StepMemory, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.registry import load_device


@dataclass(frozen=True, kw_only=True)
class World:
    """An algorithm, its draft and the target's head, in one precision."""

    algorithm: Eagle3
    draft: Eagle3Draft
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
        return torch.randint(
            0, self.algorithm.geometry.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)
        )

    def assembled(self, tokens: TokenRows, features: Sequence[Features], chunk_rows: int = 5) -> Batch:
        """Rows of any documents; `features` are of whole rows."""
        plan = Plan(steps=self.algorithm.options.unroll, chunk_rows=chunk_rows, device=torch.device("cpu"))
        rows = FeatureRows.of(features, [torch.ones(len(f.input_ids_T), dtype=torch.bool) for f in features])
        return build_batch(replace(rows, tokens=tokens), plan)

    def step(
        self, features: Sequence[Features], loss_masks: Sequence[Tensor], memory: StepMemory = KEEP_ALL
    ) -> StepResult:
        return self.algorithm.step(self.draft, self.head, FeatureRows.of(features, loss_masks), self.device, memory)


@pytest.fixture(scope="session")
def cpu() -> Device:
    return load_device("cpu")


@pytest.fixture
def make_world(tiny_llama: Path, tiny_deepseek: Path, tmp_path: Path, cpu: Device) -> Callable[..., World]:
    """make_world(dtype=..., draft_config={...}, **options); `draft_config` becomes the file of options.config.

    With options of EAGLE-3.1 it is one; with latent attention the target has it, too.
    """

    def make(
        dtype: torch.dtype = torch.float64,
        draft_config: dict[str, Any] | None = None,
        ids_N: Tensor | None = None,
        **options: Any,
    ) -> World:
        if draft_config is not None:
            path = tmp_path / "draft.json"
            path.write_text(json.dumps(draft_config))
            options["config"] = path
        target = tiny_deepseek if options.get("attention") == "mla" else tiny_llama
        spec = read_target_spec(target)
        vocabulary = VocabularyMap.identity(spec.vocab_size)
        if ids_N is not None:
            vocabulary = VocabularyMap(ids_N=ids_N, target_size=spec.vocab_size)
        if {"fc_norm", "norm_output"} & options.keys():
            algorithm: Eagle3 = Eagle31.create(Eagle31Options(vocab_size=vocabulary.size, **options), spec)
        else:
            algorithm = Eagle3.create(Eagle3Options(vocab_size=vocabulary.size, **options), spec)
        head = load_target_head(target, dtype=dtype, device=torch.device("cpu"))
        torch.manual_seed(0)
        draft = algorithm.build_draft(vocabulary, head)
        with torch.no_grad():  # norm weights of one would hide a norm applied with the wrong weight
            for name, parameter in draft.named_parameters():
                if "norm" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        return World(algorithm=algorithm, draft=draft.to(dtype), head=head, device=cpu)

    return make
