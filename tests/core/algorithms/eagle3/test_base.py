"""What all algorithms take from `algorithms/{base,options,vocabulary}.py`, seen through EAGLE-3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.interfaces.algorithm import KEEP_ALL, StepMemory
from torchspec.core.objectives.chunks import LossShape, chunk_rows

BUDGET = 1 << 22


@pytest.mark.parametrize("term", ["kl", "jsd"])
@pytest.mark.parametrize(("ranks", "shard_logits"), [(1, "tokens"), (4, "tokens"), (4, "vocabulary")])
def test_a_chunk_is_planned_with_all_that_it_holds(
    make_world: Callable[..., Any], term: str, ranks: int, shard_logits: Any
) -> None:
    world = make_world(unroll=3, ids_N=torch.arange(0, 300, 2), objective={term: 1.0})
    shards = SimpleNamespace(size=ranks) if ranks > 1 else None
    head: Any = SimpleNamespace(
        shard_VH=torch.empty(1, dtype=torch.bfloat16), embedding_VH=torch.empty(1), shards=shards
    )
    hidden, memory = world.algorithm.geometry.hidden_size, StepMemory(shard_logits=shard_logits)
    shape = LossShape(
        steps=3, hidden=hidden, draft_vocabulary=150, target_vocabulary=300, itemsize=2, with_logs=term == "jsd",
        ranks=ranks, shard_logits=shard_logits,
    )  # fmt: skip
    plan = world.algorithm.plan(head, BUDGET, memory)
    assert (plan.steps, plan.shards, plan.device) == (3, shards, torch.device("cpu"))
    assert plan.chunk_rows == chunk_rows(shape, BUDGET)


def test_what_a_chunk_holds_decides_its_rows(make_world: Callable[..., Any]) -> None:
    """Else the test above would hold for anything."""

    def rows(term: str, ranks: int) -> int:
        world = make_world(unroll=3, ids_N=torch.arange(0, 300, 2), objective={term: 1.0})
        shards = SimpleNamespace(size=ranks) if ranks > 1 else None
        head: Any = SimpleNamespace(shard_VH=torch.empty(1), embedding_VH=torch.empty(1), shards=shards)
        return int(world.algorithm.plan(head, BUDGET, KEEP_ALL).chunk_rows)

    assert len({rows("kl", 1), rows("jsd", 1), rows("kl", 4)}) == 3


def test_a_map_that_is_loaded_in_place_is_the_map(make_world: Callable[..., Any]) -> None:
    draft = make_world(unroll=1, ids_N=torch.arange(0, 300, 2)).draft
    assert draft.vocabulary.ids_N.tolist() == list(range(0, 300, 2))
    assert draft.vocabulary is draft.vocabulary, "its host copy is kept"
    other = make_world(unroll=1, ids_N=torch.arange(1, 300, 2)).draft
    draft.load_state_dict(other.state_dict())
    assert draft.vocabulary.ids_N.tolist() == list(range(1, 300, 2))


def test_a_start_brings_its_geometry(tmp_path: Path) -> None:
    exported, run, bare = tmp_path / "exported", tmp_path / "run", tmp_path / "bare"
    for folder in (exported, run / "draft"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({}))
    bare.mkdir()
    assert Eagle3Options(init_from=exported).config == exported / "config.json"
    assert Eagle3Options(init_from=run).config == run / "draft/config.json"
    assert Eagle3Options(init_from=bare).config is None
    assert Eagle3Options(init_from=exported, config=run / "draft").config == run / "draft/config.json"
