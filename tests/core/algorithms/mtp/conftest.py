"""Tiny targets with a head of their own, made from torch, and all of a training on one but the target's layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from torchspec.core.algorithms.eagle3.batch import Batch, Plan, build_batch
from torchspec.core.algorithms.mtp.algorithm import Mtp
from torchspec.core.algorithms.mtp.model import MtpDraft
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import KEEP_ALL, StepMemory, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.registry import load_device

KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases of q, k and v
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),  # norms of q's and k's heads
}
LAYERS, HIDDEN, WIDTH, HEADS, KV_HEADS, INNER, VOCABULARY = 3, 32, 8, 4, 2, 48, 120
GEOMETRY = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-3,
    # Powers of 16 are exact in every precision, so the frequencies are the definition's to the last bit.
    "rope_parameters": {"rope_type": "default", "rope_theta": 16.0},
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}

# Written out name by name, as the families' checkpoints have them.
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HEADS * WIDTH, HIDDEN),
    "self_attn.k_proj.weight": (KV_HEADS * WIDTH, HIDDEN),
    "self_attn.v_proj.weight": (KV_HEADS * WIDTH, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * WIDTH),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
}
EXTRA = {
    "llama": {},
    "qwen2": {
        "self_attn.q_proj.bias": (HEADS * WIDTH,),
        "self_attn.k_proj.bias": (KV_HEADS * WIDTH,),
        "self_attn.v_proj.bias": (KV_HEADS * WIDTH,),
    },
    "qwen3": {"self_attn.q_norm.weight": (WIDTH,), "self_attn.k_norm.weight": (WIDTH,)},
}
AROUND = {
    "mimo": ("model.mtp_layers.0.", "", ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")),
    "deepseek": (f"model.layers.{LAYERS}.", "", ("enorm", "hnorm", "eh_proj", "shared_head.norm")),
    "qwen": ("mtp.", "layers.0.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")),
}
CASES = (("mimo", "qwen2"), ("deepseek", "llama"), ("qwen", "qwen3"))
"""Every family around every kind of layer once."""


def head_tensors(family: str, kind: str, seed: int = 7) -> dict[str, Tensor]:
    """A random head under its published names."""
    prefix, inner, (token_norm, hidden_norm, proj, norm) = AROUND[family]
    shapes: dict[str, tuple[int, ...]] = {f"{inner}{name}": shape for name, shape in (LAYER | EXTRA[kind]).items()}
    shapes |= {f"{name}.weight": (HIDDEN,) for name in (token_norm, hidden_norm, norm)}
    shapes[f"{proj}.weight"] = (HIDDEN, 2 * HIDDEN)
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        # Norm weights of one would hide a norm applied with the wrong weight.
        return (
            1 + 0.2 * drawn if "norm" in name else 0.3 * drawn if name.endswith("bias") else drawn * shape[-1] ** -0.5
        )

    return {prefix + name: value(name, shape) for name, shape in shapes.items()}


def add_tensors(target: Path, tensors: dict[str, Tensor], **config: object) -> None:
    """To the single file of a saved target, and fields to its config.json."""
    weights = target / "model.safetensors"
    save_file({**load_file(weights), **tensors}, weights, metadata={"format": "pt"})
    stated = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stated | config))


Targets = Callable[..., Path]


@pytest.fixture(scope="session")
def make_target(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    """make_target(family, kind): a target of that kind of layer with a head of that family; None: without."""
    made: dict[tuple[str | None, str], Path] = {}

    def make(family: str | None, kind: str, fresh: bool = False) -> Path:
        if (family, kind) in made and not fresh:
            return made[family, kind]
        path = tmp_path_factory.mktemp("mtp") / f"{family}-{kind}"
        config, model = KINDS[kind]
        torch.manual_seed(3)
        built = model(config(**GEOMETRY))
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if "norm" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        built.save_pretrained(path)
        if family is not None:
            add_tensors(path, head_tensors(family, kind), num_nextn_predict_layers=1)
        if not fresh:
            made[family, kind] = path
        return path

    return make


@dataclass(frozen=True, kw_only=True)
class World:
    """An algorithm, its draft and the target's head, in one precision."""

    algorithm: Mtp
    draft: MtpDraft
    head: TargetHead
    device: Device

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.norm.weight.dtype

    def features(self, ids_T: Tensor, seed: int = 0, norm_state: NormState = "pre_norm") -> Features:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        return Features(
            input_ids_T=ids_T,
            taps_TNH=random(len(ids_T), 1, HIDDEN),
            last_TH=2 * random(len(ids_T), HIDDEN),
            tap_layers=self.algorithm.taps,
            norm_state=norm_state,
        )

    def tokens(self, length: int, seed: int = 0) -> Tensor:
        return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))

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
def make_world(make_target: Targets, cpu: Device) -> Callable[..., World]:
    """make_world(family of the target's head, kind of its layers, dtype=..., **options)."""

    def make(held: str | None, kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> World:
        path = make_target(held, kind)
        algorithm = Mtp.create(MtpOptions(**options), read_target_spec(path))
        head = load_target_head(path, dtype=dtype, device=torch.device("cpu"))
        torch.manual_seed(0)
        draft = algorithm.build_draft(VocabularyMap.identity(VOCABULARY), head)
        return World(algorithm=algorithm, draft=draft.to(dtype), head=head, device=cpu)

    return make
