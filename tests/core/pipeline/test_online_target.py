"""A target that changes under its draft, and the drafts that are exported or pushed meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from torchspec.core.errors import ConfigError, TargetError
from torchspec.core.models.target_tensors import TargetTensors


def test_drafts_are_exported_checked_and_pushed_by_the_same_names(
    kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path
) -> None:
    trainer = online.make(kept_policy, draft={"unroll": 3, "vocab_size": 100}, token_counts=torch.arange(300))
    online.losses(trainer, kept_policy, 3)
    for each in ("hf", "vllm"):
        outcome = trainer.export(tmp_path / each, format=each)
        assert outcome.recorded
        assert outcome.total_variation < 1e-5
        stored = load_file(tmp_path / each / "model.safetensors")
        pushed = dict(trainer.draft_weights(format=each))
        assert stored.keys() == pushed.keys()
        assert all(torch.equal(stored[name], pushed[name]) for name in stored)
    assert int((stored["d2t"] + torch.arange(100)).min()) == 200  # the 100 that are used most
    half = dict(trainer.draft_weights(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in half.values() if tensor.is_floating_point()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="no such format"):
        trainer.export(tmp_path / "other", format="onnx")


def test_a_draft_goes_on_from_an_exported_one(kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path) -> None:
    trainer = online.make(kept_policy)
    online.losses(trainer, kept_policy, 3)
    trainer.export(tmp_path / "draft")
    again = online.make(kept_policy, draft={"unroll": 3, "init_from": str(tmp_path / "draft")})
    probe = [online.sample(kept_policy, trainer, 9)]
    assert again.evaluate(probe) == trainer.evaluate(probe)
    with pytest.raises(ConfigError, match=r"draft.taps: the draft in draft.init_from reads"):
        online.make(kept_policy, draft={"init_from": str(tmp_path / "draft"), "taps": [0, 1, 2]})


def changed(policy: PreTrainedModel) -> None:
    """As an optimizer would, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_a_target_that_changes_teaches_from_its_update_on(policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(policy)
    probe = [online.sample(policy, trainer, 50, norm_state="pre_norm")]
    before = trainer.evaluate(probe)
    for number in range(4):
        trainer.add(**online.sample(policy, trainer, number))
    changed(policy)
    assert trainer.evaluate(probe) == before
    trainer.update_target(policy)
    other = online.make(policy)
    other.load_state_dict(trainer.state_dict())
    after = trainer.evaluate(probe)
    assert after == other.evaluate(probe)
    assert after["loss"] != before["loss"]
    parts = online.make(policy)
    parts.load_state_dict(trainer.state_dict())
    parts.update_target(head=torch.zeros(300, 64))
    parts.update_target(embedding=policy.model.embed_tokens.weight, norm=policy.model.norm.weight)
    parts.update_target(head=policy.lm_head.weight)
    assert parts.evaluate(probe) == after
    trainer.add(**online.sample(policy, trainer, 4))
    trainer.add(**online.sample(policy, trainer, 5))
    rows = [online.figures(trainer.step()), online.figures(trainer.step())]
    assert [row["stale_samples"] for row in rows] == [3, 1]


def test_an_update_that_does_not_fit_changes_nothing(
    policy: PreTrainedModel, kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(policy)
    probe = [online.sample(policy, trainer, 50)]
    before = trainer.evaluate(probe)
    nan = torch.full((300, 64), float("nan"))
    with pytest.raises(TargetError, match=r"norm has \['bias'\], not \['weight'\]; head is not finite"):
        trainer.update_target(embedding=torch.zeros(300, 64), head=nan, norm={"bias": torch.zeros(64)})
    with pytest.raises(TargetError, match=r"norm weight has shape \[63\], expected \[64\]"):
        trainer.update_target(embedding=torch.zeros(300, 64), norm=torch.ones(63))
    with pytest.raises(TargetError, match="given a target and head, expected a target or some of its tensors"):
        trainer.update_target(policy, head=torch.zeros(300, 64))
    with pytest.raises(TargetError, match=r"embedding: list, .*; head: on the meta device.*; norm weight: int32"):
        trainer.update_target(embedding=[1], head=nan.to("meta"), norm=torch.ones(64).int())
    with pytest.raises(TargetError, match="given nothing"):
        trainer.update_target()
    with pytest.raises(TargetError, match="given a str"):
        trainer.update_target("elsewhere")
    assert trainer.evaluate(probe) == before
    tied = online.make(kept_policy)
    with pytest.raises(TargetError, match="are one tensor"):
        tied.update_target(embedding=torch.zeros(300, 64), head=torch.ones(300, 64))


def test_a_directory_a_model_and_tensors_are_the_same_target(
    policy: PreTrainedModel, tiny_llama: Path, online: ModuleType
) -> None:
    tensors = TargetTensors(
        config=policy.config,
        embedding_VH=policy.model.embed_tokens.weight,
        head_VH=policy.lm_head.weight,
        norm={"weight": policy.model.norm.weight},
    )
    found = [online.losses(online.make(target), policy, 3) for target in (tiny_llama, policy, tensors)]
    assert found[0] == found[1] == found[2]
    with pytest.raises(TargetError, match=r"head is missing, and the configuration does not tie it"):
        online.make(replace(tensors, head_VH=None))
    with pytest.raises(TargetError, match=r"embedding has shape \[299, 64\], expected \[300, 64\]"):
        online.make(replace(tensors, embedding_VH=tensors.embedding_VH[1:]))
