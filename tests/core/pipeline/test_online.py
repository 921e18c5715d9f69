"""A trainer inside somebody else's process: what it takes and refuses, what it leaves alone, and how it goes on."""

from __future__ import annotations

import io
import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.errors import CheckpointError, ConfigError, StoreFullError, TargetError
from torchspec.core.models.target_tensors import TargetTensors
from torchspec.core.training.brought import SampleError
from torchspec.core.training.update import NonFiniteError


@pytest.fixture(scope="module")
def kept_policy(online: ModuleType, tiny_target: Path) -> PreTrainedModel:
    """With a tied embedding. Not to be changed."""
    policy: PreTrainedModel = online.load_policy(tiny_target)
    return policy


@pytest.fixture
def policy(online: ModuleType, tiny_llama: Path) -> PreTrainedModel:
    """With a head of its own."""
    policy: PreTrainedModel = online.load_policy(tiny_llama)
    return policy


def losses(online: ModuleType, trainer: Any, policy: PreTrainedModel, count: int = 6) -> list[dict[str, Any]]:
    """Figures of the steps that so many samples make."""
    for number in range(count):
        trainer.add(**online.sample(policy, trainer, number))
    return [online.figures(row) for row in iter(trainer.step, None)]


def test_everything_wrong_with_the_settings_is_said_at_once(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    with pytest.raises(ConfigError) as caught:
        online.make(
            kept_policy,
            draft={"unrol": 3, "objective": {"tv": {"start": 0.1, "end": 1.0}}, "vocab_size": 100},
            train={"lr": -1.0},
            hold={"when_full": "wait"},
        )
    assert {problem.field for problem in caught.value.problems} == {"draft.unrol", "train.lr", "hold.when_full"}
    with pytest.raises(ConfigError) as caught:
        online.make(
            kept_policy,
            draft={"objective": {"tv": {"start": 0.1, "end": 1.0}}, "vocab_size": 100},
            train={"schedule": "cosine", "epochs": 2, "batch_size": 4, "batch_tokens": 99, "offload": "states",
                   "tokens_per_rank": 50, "micro_batch_size": 2},
            precision={"fp8_scaling": "row"},
        )  # fmt: skip
    assert {problem.field for problem in caught.value.problems} == {
        "train.schedule", "train.epochs", "train.batch_size", "train.offload", "train.micro_batch_size",
        "draft.objective", "draft.vocab_size", "precision.fp8_scaling",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"draft.curriculum: depends on how many steps there will be"):
        online.make(kept_policy, "domino", draft={"num_layers": 1})
    with pytest.raises(ConfigError, match="no device of this name"):
        online.make(kept_policy, device="abacus")
    with pytest.raises(ConfigError) as caught:
        online.make(kept_policy, draft={"vocab_size": 100}, token_counts=torch.ones(301), device="cpu:1")
    assert {problem.field for problem in caught.value.problems} == {"token_counts", "device"}
    with pytest.raises(ConfigError, match="target: is a Linear, expected a directory"):
        online.make(torch.nn.Linear(2, 2))


def test_everything_wrong_with_a_sample_is_said_at_once_and_nothing_is_kept(
    kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(kept_policy)
    good = online.sample(kept_policy, trainer, 1)
    layers, length = trainer.required.tap_layers, len(good["tokens"])
    assert trainer.required.hf_hidden_states == tuple(layer + 1 for layer in layers)

    def said(**wrong: Any) -> str:
        with pytest.raises(SampleError) as caught:
            trainer.add(**{**good, **wrong})
        return str(caught.value)

    narrow = {layer: tensor[:, :-1] for layer, tensor in good["hidden_states"].items()}
    text = said(hidden_states=narrow, last=good["last"][:-1], loss_mask=good["loss_mask"][1:], norm_state="normed")
    assert f"hidden states of layer {layers[0]}: shape [{length}, 63], expected [{length}, 64]" in text
    assert f"last: shape [{length - 1}, 64]" in text
    assert f"loss_mask has shape [{length - 1}]" in text
    assert "norm_state is 'normed'" in text
    assert f"{layers[1]}, {layers[2]} of those" in said(hidden_states={layers[0]: good["last"]})
    stacked = torch.stack(list(good["hidden_states"].values()), dim=1)
    assert f"expected [T, {len(layers)}, 64]" in said(hidden_states=stacked[:, :1])
    broken = {layer: tensor.clone() for layer, tensor in good["hidden_states"].items()}
    broken[layers[2]][3, 5] = float("nan")
    assert f"hidden states of layer {layers[2]}: not finite" in said(hidden_states=broken)
    assert "last: not finite" in said(last=good["last"] * float("inf"))
    assert "tokens are from 0 to 300" in said(tokens=[0, 300, *([3] * (length - 2))])
    assert "whole numbers [T]" in said(tokens=good["tokens"][None])
    assert "other values than 0 and 1" in said(loss_mask=[2] * length)
    listed = {**good["hidden_states"], layers[1]: good["last"].tolist()}
    assert f"hidden states of layer {layers[1]}: list, expected a tensor" in said(hidden_states=listed)
    assert "last: NoneType, expected a tensor" in said(last=None)
    assert "last: on the meta device" in said(last=good["last"].to("meta"))
    assert "hidden_states is a list, expected tensors by layer" in said(hidden_states=[good["last"]] * len(layers))
    assert trainer.pending.samples == 0
    assert trainer.counts.received == 0
    trainer.add(**{**good, "hidden_states": stacked, "loss_mask": good["loss_mask"].int()})
    assert trainer.pending.samples == 1


def test_hidden_states_are_copied(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """So the caller's buffers may be used again; by layer, in any order, or in one tensor."""
    plain, reused = online.make(kept_policy), online.make(kept_policy)
    for number in range(3):
        given = online.sample(kept_policy, plain, number)
        plain.add(**{**given, "hidden_states": dict(reversed(given["hidden_states"].items()))})
        mine = online.sample(kept_policy, reused, number)
        mine["hidden_states"] = torch.stack(list(mine["hidden_states"].values()), dim=1)
        reused.add(**mine)
        for name in ("hidden_states", "last", "tokens", "loss_mask"):
            mine[name].zero_()
    assert online.figures(plain.step()) == online.figures(reused.step())


def test_a_full_budget_refuses_or_drops_and_counts(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(kept_policy, hold={"budget_mb": 1})
    sizes = []
    for number in range(1000):
        before, given = trainer.pending.nbytes, online.sample(kept_policy, trainer, number)
        if before > 990_000:
            break
        trainer.add(**given)
        sizes.append(trainer.pending.nbytes - before)
    with pytest.raises(StoreFullError, match=r"call step\(\) first"):
        trainer.add(**given)
    held = trainer.pending
    assert (held.samples, held.nbytes) == (len(sizes), sum(sizes))
    assert held.nbytes <= held.budget == 1_000_000 < held.nbytes + max(sizes)
    assert trainer.step() is not None
    trainer.add(**online.sample(kept_policy, trainer, 0))
    counts = trainer.counts
    assert (counts.received, counts.trained, counts.dropped) == (len(sizes) + 1, 3, 0)

    drops = online.make(kept_policy, hold={"budget_mb": 1, "when_full": "drop_oldest"})
    for number in range(len(sizes) + 4):
        drops.add(**online.sample(kept_policy, drops, number))
        assert drops.pending.nbytes <= 1_000_000
    counts = drops.counts
    assert counts.dropped > 0
    assert counts.received == len(sizes) + 4 == counts.trained + counts.dropped + drops.pending.samples
    assert drops.clear() == drops.pending.samples + drops.counts.dropped - counts.dropped
    assert drops.counts.dropped == drops.counts.received


def test_windows_by_tokens(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """Lengths are 10, 13, 16, 19, 22, 10, ...: as few samples, in order, as have 30 tokens."""
    trainer = online.make(kept_policy, train={"batch_tokens": 30, "micro_batch_size": 2})
    rows = losses(online, trainer, kept_policy, 6)
    assert [(row["samples"], row["tokens"]) for row in rows] == [(3, 39), (5, 80)]
    assert trainer.pending.tokens == 10


@contextmanager
def unusual() -> Iterator[None]:
    """What callers may have set."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        stack.enter_context(torch.device("meta"))
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, torch.float32)
        yield


def settings() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), dist.is_initialized(),
        [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        list(logging.getLogger().handlers), logging.getLogger().level, list(logging.getLogger("torchspec").handlers),
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
def test_the_process_is_left_as_it_was_and_decides_nothing(
    kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path, algorithm: str
) -> None:
    plain = online.make(kept_policy, algorithm)
    given = [online.sample(kept_policy, plain, number) for number in range(6)]
    for each in given:
        plain.add(**each)
    expected = [online.figures(plain.step()), online.figures(plain.step())]
    evaluated = plain.evaluate(given)
    torch.manual_seed(99)
    with unusual():
        before = settings()
        trainer = online.make(kept_policy, algorithm)
        assert settings() == before
        for each in given:
            trainer.add(**each)
        found = [online.figures(trainer.step()), online.figures(trainer.step())]
        assert settings() == before
        assert trainer.evaluate(given) == evaluated
        trainer.update_target(kept_policy)
        trainer.load_state_dict(trainer.state_dict())
        trainer.export(tmp_path / "draft")
        dict(trainer.draft_weights())
        assert settings() == before
    assert found == expected


def test_trainers_do_not_know_of_each_other(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    expected = {name: losses(online, online.make(kept_policy, name), kept_policy) for name in online.ALGORITHMS}
    trainers = {name: online.make(kept_policy, name) for name in online.ALGORITHMS}
    found: dict[str, list[Any]] = {name: [] for name in trainers}
    for number in range(6):
        for name, trainer in trainers.items():
            trainer.add(**online.sample(kept_policy, trainer, number))
            row = trainer.step()
            found[name] += [] if row is None else [online.figures(row)]
    assert found == expected


def test_random_numbers_are_the_trainers_own_and_go_on(
    kept_policy: PreTrainedModel, online: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of an algorithm that draws from the global state, as plug-ins may."""
    step, drawn = Eagle3.step, list[float]()

    def drawing(*arguments: Any, **more: Any) -> Any:
        drawn.append(torch.rand(()).item())
        return step(*arguments, **more)

    monkeypatch.setattr(Eagle3, "step", drawing)
    losses(online, online.make(kept_policy), kept_policy)
    expected, drawn[:] = drawn[:], []
    assert len(set(expected)) == 4
    torch.manual_seed(0)
    trainer = online.make(kept_policy)
    losses(online, trainer, kept_policy, 3)
    torch.manual_seed(1)
    again = online.make(kept_policy)
    again.load_state_dict(trainer.state_dict())
    drawn_before = drawn[:]
    again.evaluate([online.sample(kept_policy, again, 0)])
    again.export(tmp_path / "draft")
    drawn[:] = drawn_before
    losses(online, again, kept_policy, 3)
    assert drawn == expected


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
def test_a_trainer_that_continues_from_a_state_repeats_the_undisturbed_run(
    kept_policy: PreTrainedModel, online: ModuleType, algorithm: str, optimizer: str, request: pytest.FixtureRequest
) -> None:
    """The state goes through a file that holds no code; samples that wait go with it."""
    if optimizer == "adamw8bit":
        request.getfixturevalue("torchao")
    more: dict[str, Any] = {"train": {**online.TRAIN, "optimizer": optimizer}}
    if algorithm == "eagle3":
        more["draft"] = {"unroll": 3, "objective": {"lk_lambda": 1.0}}
    trainer = online.make(kept_policy, algorithm, **more)
    for number in range(8):
        trainer.add(**online.sample(kept_policy, trainer, number))
    trainer.step()
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    trainer.add(**online.sample(kept_policy, trainer, 8))
    expected = [online.figures(trainer.step()), online.figures(trainer.step())]
    again = online.make(kept_policy, algorithm, **more)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.add(**online.sample(kept_policy, again, 8))
    assert [online.figures(again.step()), online.figures(again.step())] == expected
    weights = dict(trainer.draft_weights())
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.draft_weights())
    assert again.counts == trainer.counts


def test_a_state_without_its_samples_counts_them_as_dropped(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(kept_policy)
    for number in range(5):
        trainer.add(**online.sample(kept_policy, trainer, number))
    trainer.step()
    again = online.make(kept_policy)
    again.load_state_dict(trainer.state_dict(held=False))
    assert again.pending.samples == 0
    assert (again.counts.received, again.counts.trained, again.counts.dropped) == (5, 3, 2)
    assert again.steps == 1


def test_a_state_of_another_training_is_refused(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(kept_policy)
    before = dict(trainer.draft_weights())
    other = online.make(kept_policy, "eagle3", draft={"unroll": 2, "intermediate_size": 32}, seed=6)
    with pytest.raises(CheckpointError) as caught:
        trainer.load_state_dict(other.state_dict())
    said = ("draft.unroll: the state has 2, this trainer 3", "seed: the state has 6, this trainer 5", "mlp")
    assert all(each in str(caught.value) for each in said)
    with pytest.raises(CheckpointError, match="not whole: counts, probe are missing"):
        trainer.load_state_dict({k: v for k, v in trainer.state_dict().items() if k not in ("counts", "probe")})
    with pytest.raises(CheckpointError, match="the state is a list"):
        trainer.load_state_dict([])
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.draft_weights())


def test_drafts_are_exported_checked_and_pushed_by_the_same_names(
    kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path
) -> None:
    trainer = online.make(kept_policy, draft={"unroll": 3, "vocab_size": 100}, token_counts=torch.arange(300))
    losses(online, trainer, kept_policy, 3)
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
    losses(online, trainer, kept_policy, 3)
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
    found = [losses(online, online.make(target), policy, 3) for target in (tiny_llama, policy, tensors)]
    assert found[0] == found[1] == found[2]
    with pytest.raises(TargetError, match=r"head is missing, and the configuration does not tie it"):
        online.make(replace(tensors, head_VH=None))
    with pytest.raises(TargetError, match=r"embedding has shape \[299, 64\], expected \[300, 64\]"):
        online.make(replace(tensors, embedding_VH=tensors.embedding_VH[1:]))


def test_a_loss_that_is_not_finite_updates_nothing_and_drops_the_window(
    kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(kept_policy)
    losses(online, trainer, kept_policy, 3)
    before = {name: tensor.clone() for name, tensor in trainer.draft_weights()}
    bad = online.sample(kept_policy, trainer, 3)
    bad["last"] = torch.full_like(bad["last"], 3.4e38)  # finite, but no logits are
    trainer.add(**bad)
    for number in (4, 5):
        trainer.add(**online.sample(kept_policy, trainer, number))
    with pytest.raises(NonFiniteError, match=r"step 2: .*window's samples are dropped.* s3, s4, s5"):
        trainer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.draft_weights())
    assert (trainer.counts.trained, trainer.counts.dropped, trainer.pending.samples) == (3, 3, 0)
    undisturbed = online.make(kept_policy)
    losses(online, undisturbed, kept_policy, 3)
    for each in (trainer, undisturbed):
        for number in range(6, 9):
            each.add(**online.sample(kept_policy, each, number))
    assert online.figures(trainer.step())["loss"] == online.figures(undisturbed.step())["loss"]


def test_after_another_error_the_samples_are_still_held(
    kept_policy: PreTrainedModel, online: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(online, online.make(kept_policy), kept_policy, 3)
    trainer, step, calls = online.make(kept_policy), Eagle3.step, list[int]()

    def failing(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first micro-batch has left gradients
            raise MemoryError("the device is full")
        return step(*arguments, **more)

    monkeypatch.setattr(Eagle3, "step", failing)
    with pytest.raises(MemoryError):
        losses(online, trainer, kept_policy, 3)
    assert trainer.pending.samples == 3
    assert [online.figures(trainer.step())] == expected


def test_a_window_without_supervision_is_counted_and_changes_nothing(
    kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(kept_policy)
    before = dict(trainer.draft_weights())
    for number in range(3):
        given = online.sample(kept_policy, trainer, number)
        trainer.add(**{**given, "loss_mask": torch.zeros_like(given["loss_mask"])})
    row = online.figures(trainer.step())
    assert (row["loss"], row["lr"], row["empty_windows"], row["samples"]) == (None, None, 1, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.draft_weights())


def test_names_and_epochs_decide_what_is_drawn(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    def loss(**more: Any) -> Tensor:
        trainer = online.make(kept_policy, "dflash", train={"batch_size": 1})
        trainer.add(**{**online.sample(kept_policy, trainer, 4), **more})
        return online.figures(trainer.step())["loss"]  # type: ignore[no-any-return]

    assert loss() == loss()
    assert len({loss(), loss(epoch=1), loss(name="other")}) == 3
