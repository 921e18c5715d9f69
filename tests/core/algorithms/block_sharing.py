"""Training windows of a draft of blocks whose sequences ranks share, for the workers of the algorithms that add to one.

A worker says which algorithm, its options, and what of its parameters is moved off the values at which it says nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torchspec.core import registry
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.core.parallel import mesh
from torchspec.core.training.capturing import Model
from torchspec.core.training.sharding import shard_draft

WORKER = Path(__file__).parents[1] / "parallel" / "sequence_worker.py"
COMMON = {"num_layers": 2, "block_size": 3, "num_anchors": 12}


def loaded(path: Path) -> ModuleType:
    """The module of a file, under its file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, defaults: Mapping[str, Any], moved: tuple[str, ...]) -> int:
    """The worker of tests/core/parallel with drafts of the algorithm `name`; parameters with a part of `moved` in their
    names get noise. Its exit status."""
    worker: Any = loaded(WORKER)

    def make_model(cell: dict[str, Any], context: mesh.ParallelContext) -> Model:
        dtype, size = torch.float64, worker.V
        trained = registry.algorithms().spec(name)
        options = trained.options(**{**COMMON, **defaults, **cell.get("options", {})})
        algorithm = trained.create(options, _target(worker, dtype))
        torch.manual_seed(0)
        ends = torch.randn(2, size, worker.H, dtype=dtype)
        head: Any = SafetensorsTargetHead(embedding_VH=ends[0], head_VH=0.3 * ends[1], final_norm=nn.Identity())
        if "shard_logits" in cell:
            communication = context.device.communication
            shards = VocabularyShards(group=context.logits_group, communication=communication, target_size=size)
            head = worker.SharedHead(head, shards)
        ids_N = torch.arange(size)[: algorithm.vocabulary_size]
        draft = algorithm.build_draft(VocabularyMap(ids_N=ids_N, target_size=size), head).to(dtype)
        with torch.no_grad():
            for parameter_name, parameter in draft.named_parameters():
                if any(part in parameter_name for part in moved):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return Model(
            algorithm=algorithm,
            draft=shard_draft(draft, context, "float32"),
            head=head,
            engine=worker.MadeUpTarget(dtype),
            memory=StepMemory(recompute=cell.get("recompute", False), shard_logits=cell.get("shard_logits", "tokens")),
            exchange=cell.get("exchange", "gather"),
        )

    worker.make_model = make_model
    status: int = worker.main()
    return status


def _target(worker: Any, dtype: torch.dtype) -> TargetSpec:
    return TargetSpec(
        path=Path("made-up"),
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=8,
        hidden_size=worker.H,
        intermediate_size=48,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=worker.V,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        dtype=dtype,
        tie_word_embeddings=False,
        eos_token_ids=(0,),
    )
