"""Training windows of a multi-token-prediction head whose sequences ranks share, by the worker of tests/core/parallel:
`sharing_worker.py cells.json results/ ranks port`. A cell names the target its head comes from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from torchspec.core.algorithms.mtp.algorithm import Mtp
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
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


def make_model(cell: dict[str, Any], context: mesh.ParallelContext) -> Model:
    path, dtype = Path(cell["target"]), torch.float64
    algorithm = Mtp.create(MtpOptions(**cell.get("options", {})), read_target_spec(path))
    head: Any = load_target_head(path, dtype=dtype, device=torch.device("cpu"))
    vocabulary = VocabularyMap.identity(algorithm.vocabulary_size)
    draft = algorithm.build_draft(vocabulary, head).to(dtype)
    if "shard_logits" in cell:
        shards = VocabularyShards(
            group=context.logits_group, communication=context.device.communication, target_size=vocabulary.size
        )
        head = worker.SharedHead(head, shards)
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
