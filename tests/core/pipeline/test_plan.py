"""`--dry-run`: right numbers, every problem at once, nothing loaded or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core import registry
from torchspec.core.algorithms.eagle3 import SPEC
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.plan_memory import Load, estimate
from torchspec.core.pipeline.preflight import check


def test_numbers_of_a_plan(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "train.epochs=3", "eval.every=5")
    plan = make_plan(config, provenance, Ranks(all=2, here=2))
    assert not (tmp_path / "run").exists()
    algorithm = SPEC.create(config.draft, read_target_spec(tiny_target))
    head = load_target_head(tiny_target, dtype=torch.float32, device=torch.device("cpu"))
    draft = algorithm.build_draft(VocabularyMap(ids_N=torch.arange(100), target_size=300), head)
    trained = sum(p.numel() for p in draft.parameters())
    assert plan.draft["trained parameters"] == trained
    assert plan.draft["taps (target layers)"] == [1, 3, 4]
    assert plan.draft["lm_head.weight"] == "100 x 64"
    assert plan.steps["per epoch"] == 4
    assert plan.steps["total"] == 12
    assert plan.steps["validations"] == 3
    parts = {part.name: part.bytes for part in plan.memory}
    assert parts["draft parameters"] == trained * 4 // 2
    assert parts["optimizer state"] == 2 * (trained * 4 // 2)
    weights = TargetWeights.open(tiny_target)
    stored = {name: torch.Size(weights.shape(name)).numel() for name in weights.files}
    assert parts["target model"] == sum(stored.values()) * 4
    sources = {row["path"]: (row["value"], row["source"]) for row in plan.settings}
    assert sources["train.epochs"] == (3, "command line")
    assert sources["train.lr"] == (1e-3, "default")
    assert sources["draft.unroll"] == (3, "python")
    text = plan.to_text()
    assert "train.epochs" in text
    assert "from command line" in text
    assert json.loads(json.dumps(plan.to_json()))["steps"]["total"] == 12


def test_every_problem_is_reported_at_once(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    config, provenance = make_config(tmp_path / "run")
    damaged = tmp_path / "target"
    damaged.mkdir()
    (damaged / "config.json").write_text((tiny_target / "config.json").read_text())
    (tmp_path / "run").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    draft = config.draft.model_copy(update={"taps": (1, 99), "init_from": tmp_path / "nowhere"})
    broken = config.model_copy(
        update={
            "target": config.target.model_copy(update={"path": damaged}),
            "data": config.data.model_copy(update={"train": [tmp_path / "empty.jsonl"]}),
            "draft": draft,
            "backend": "nonsense",
        }
    )
    with pytest.raises(ConfigError) as caught:
        make_plan(broken, provenance)
    with pytest.raises(ConfigError) as started:
        train(broken, provenance=provenance)
    assert started.value.problems == caught.value.problems
    fields = [problem.field for problem in caught.value.problems]
    assert set(fields) == {"backend", "output", "target.path", "draft.taps", "draft.init_from", "data.train"}
    assert len(fields) == len(set(map(str, caught.value.problems)))
    messages = str(caught.value)
    for part in ("safetensors", "tokenizer", "empty.jsonl", "99"):
        assert part in messages, part


def test_the_directory_of_the_target_is_no_output(make_config: Any, tiny_target: Path) -> None:
    config, _ = make_config(tiny_target / ".." / tiny_target.name)
    with pytest.raises(ConfigError, match="output: is the directory of the target"):
        check(config, Ranks())


def test_samples_longer_than_the_target_reads_are_refused_unless_nobody_asked_for_them(
    make_config: Any, tmp_path: Path
) -> None:
    """The target reads 512 tokens, the default is 2,048."""
    plan = make_plan(*make_config(tmp_path / "run"))
    (row,) = [row for row in plan.settings if row["path"] == "data.max_length"]
    assert (row["value"], row["source"]) == (512, "the target's context")
    assert "data.max_length is 512: the target's context" in plan.notes
    for run in (make_plan, lambda config, provenance: train(config, provenance=provenance)):
        with pytest.raises(ConfigError, match=r"(?s)data.max_length: the target reads at most 512.*got 513.*=512"):
            run(*make_config(tmp_path / "run", "data.max_length=513"))
    make_plan(*make_config(tmp_path / "run", "data.max_length=512"))


@pytest.mark.parametrize("unroll", [2, 5])
def test_the_activation_estimate_is_near_what_autograd_keeps(tiny_target: Path, unroll: int) -> None:
    target = read_target_spec(tiny_target)
    algorithm = SPEC.create(SPEC.options(unroll=unroll, vocab_size=100), target)
    head = load_target_head(tiny_target, dtype=torch.float32, device=torch.device("cpu"))
    draft = algorithm.build_draft(VocabularyMap(ids_N=torch.arange(100), target_size=300), head)
    tokens = 200
    features = Features(
        input_ids_T=torch.randint(0, 300, (tokens,)),
        taps_TNH=torch.randn(tokens, 3, 64),
        last_TH=torch.randn(tokens, 64),
        tap_layers=algorithm.taps,
        norm_state="post_norm",
    )
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in draft.parameters()} | {head.embedding_VH.data_ptr()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        algorithm.step(draft, head, [features], [torch.ones(tokens, dtype=torch.bool)], registry.load_device("cpu"))
    load = Load(ranks=1, micro_batch_tokens=tokens, compute=torch.float32, target_dtype=torch.float32)
    parts = {
        part.name: part.bytes for part in estimate(algorithm, draft, target, TargetWeights.open(tiny_target), load)
    }
    assert parts["activations"] == pytest.approx(sum(kept.values()), rel=0.35)
