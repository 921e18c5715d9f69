"""Training windows of a Domino draft whose sequences ranks share, by the worker of tests/core/parallel:
`sharing_worker.py cells.json results/ ranks port`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchspec.core.algorithms.domino.algorithm import Domino
from torchspec.core.algorithms.domino.options import DominoOptions
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.core.parallel import mesh
from torchspec.core.training.capturing import Model
from torchspec.core.training.sharding import shard_draft

WORKER = Path(__file__).parents[2] / "parallel" / "sequence_worker.py"


def shared() -> Any:
    spec = importlib.util.spec_from_file_location("sequence_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


worker = shared()
H, V = worker.H, worker.V


def make_model(cell: dict[str, Any], context: mesh.ParallelContext) -> Model:
    dtype = torch.float64
    spec = TargetSpec(
        path=Path("made-up"),
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=8,
        hidden_size=H,
        intermediate_size=48,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=V,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        dtype=dtype,
        tie_word_embeddings=False,
        eos_token_ids=(0,),
    )
    options = {"num_layers": 2, "block_size": 3, "num_anchors": 12, "gru_hidden_dim": 8, "emb_dim": 4} | cell.get(
        "options", {}
    )
    algorithm = Domino.create(DominoOptions(**options), spec)
    torch.manual_seed(0)
    ends = torch.randn(2, V, H, dtype=dtype)
    head: Any = SafetensorsTargetHead(embedding_VH=ends[0], head_VH=0.3 * ends[1], final_norm=nn.Identity())
    if "shard_logits" in cell:
        shards = VocabularyShards(group=context.logits_group, communication=context.device.communication, target_size=V)
        head = worker.SharedHead(head, shards)
    ids_N = torch.arange(V)[: algorithm.vocabulary_size]
    draft = algorithm.build_draft(VocabularyMap(ids_N=ids_N, target_size=V), head).to(dtype)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name.startswith(("prefix_gru", "embed_proj")):
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

if __name__ == "__main__":
    sys.exit(worker.main())
