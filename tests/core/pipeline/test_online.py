"""A trainer inside somebody else's process: its settings, what it leaves alone, and how it goes on."""

from __future__ import annotations

import gc
import io
import logging
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import distributed as dist
from transformers import PreTrainedModel

from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.errors import CheckpointError, ClosedError, ConfigError, NonFiniteError


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
    for counts, said in (([1, 2], "list, expected a tensor"), (torch.ones(300, device="meta"), "meta device"),
                         (-torch.ones(300), "below 0"), (torch.full((300,), float("nan")), "no numbers")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"token_counts: .*{said}"):
            online.make(kept_policy, draft={"vocab_size": 100}, token_counts=counts)
    with pytest.raises(ConfigError, match="group: is of type int, expected a process group"):
        online.make(kept_policy, group=3)
    with pytest.raises(ConfigError, match="target: is a Linear, expected a directory"):
        online.make(torch.nn.Linear(2, 2))


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
    expected = {name: online.losses(online.make(kept_policy, name), kept_policy) for name in online.ALGORITHMS}
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
    online.losses(online.make(kept_policy), kept_policy)
    expected, drawn[:] = drawn[:], []
    assert len(set(expected)) == 4
    torch.manual_seed(0)
    trainer = online.make(kept_policy)
    online.losses(trainer, kept_policy, 3)
    torch.manual_seed(1)
    again = online.make(kept_policy)
    again.load_state_dict(trainer.state_dict())
    drawn_before = drawn[:]
    again.evaluate([online.sample(kept_policy, again, 0)])
    again.export(tmp_path / "draft")
    drawn[:] = drawn_before
    online.losses(again, kept_policy, 3)
    assert drawn == expected


def test_a_start_from_another_algorithms_draft_is_refused_by_its_name(
    kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path
) -> None:
    online.make(kept_policy).export(tmp_path / "draft")
    with pytest.raises(ConfigError) as caught:
        online.make(kept_policy, "dflash", draft={"init_from": str(tmp_path / "draft")})
    (problem,) = caught.value.problems
    assert (problem.field, problem.message) == (
        "draft.init_from", "is a draft of eagle3, and this run trains dflash",
    )  # fmt: skip
    online.make(kept_policy, draft={"init_from": str(tmp_path / "draft"), "unroll": 3})


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


def test_a_loss_that_is_not_finite_updates_nothing_and_drops_the_window(
    kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(kept_policy)
    online.losses(trainer, kept_policy, 3)
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
    online.losses(undisturbed, kept_policy, 3)
    for each in (trainer, undisturbed):
        for number in range(6, 9):
            each.add(**online.sample(kept_policy, each, number))
    assert online.figures(trainer.step())["loss"] == online.figures(undisturbed.step())["loss"]


def test_after_another_error_the_samples_are_still_held(
    kept_policy: PreTrainedModel, online: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = online.losses(online.make(kept_policy), kept_policy, 3)
    trainer, step, calls = online.make(kept_policy), Eagle3.step, list[int]()

    def failing(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first micro-batch has left gradients
            raise MemoryError("the device is full")
        return step(*arguments, **more)

    monkeypatch.setattr(Eagle3, "step", failing)
    with pytest.raises(MemoryError):
        online.losses(trainer, kept_policy, 3)
    assert trainer.pending.samples == 3
    assert [online.figures(trainer.step())] == expected


def test_a_step_that_fails_has_drawn_nothing(
    kept_policy: PreTrainedModel, online: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, drawn, fails = Eagle3.step, list[float](), [False]

    def drawing(*arguments: Any, **more: Any) -> Any:
        drawn.append(torch.rand(()).item())
        if fails[0]:
            raise MemoryError("the device is full")
        return step(*arguments, **more)

    monkeypatch.setattr(Eagle3, "step", drawing)
    trainer = online.make(kept_policy)
    fails[0] = True
    with pytest.raises(MemoryError):
        online.losses(trainer, kept_policy, 3)
    fails[0] = False
    trainer.step()
    assert drawn[0] == drawn[1]


def test_trainers_in_threads_of_one_process_draw_their_own_numbers(
    kept_policy: PreTrainedModel, online: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random states and the default dtype are the process's: who computes has them alone."""
    step, drawn, inside = Eagle3.step, dict[int, list[float]](), threading.Event()

    def drawing(self: Eagle3, *arguments: Any, **more: Any) -> Any:
        inside.set()
        time.sleep(0.1)  # the other thread comes in here, if it is let in
        assert torch.get_default_dtype() == torch.float32
        drawn.setdefault(id(self), []).append(torch.rand(()).item())
        return step(self, *arguments, **more)

    def numbers(*trainers: Any) -> list[list[float]]:
        return [drawn.pop(id(trainer._model.algorithm)) for trainer in trainers]

    monkeypatch.setattr(Eagle3, "step", drawing)
    pairs = [[online.make(kept_policy, seed=seed) for seed in (5, 6)] for _ in range(2)]
    for trainer in (*pairs[0], *pairs[1]):
        for number in range(3):
            trainer.add(**online.sample(kept_policy, trainer, number))
    for trainer in pairs[0]:
        trainer.step()
    expected = numbers(*pairs[0])
    torch.set_default_dtype(torch.float64)
    try:
        inside.clear()
        other = threading.Thread(target=lambda: (inside.wait(10), pairs[1][1].step()))
        other.start()
        pairs[1][0].step()
        other.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert numbers(*pairs[1]) == expected


def test_a_closed_trainer_has_let_go_and_says_so(
    kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path
) -> None:
    trainer = online.make(kept_policy)
    online.losses(trainer, kept_policy, 4)
    state, weights = trainer.state_dict(), trainer.draft_weights()
    held = [weakref.ref(parameter) for parameter in trainer._model.draft.parameters()]
    held += [weakref.ref(trainer._held.first(1)[0].features.last_TH), weakref.ref(trainer._ends.head_VH)]
    with pytest.raises(ZeroDivisionError), trainer:
        _ = 1 / 0
    trainer.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
    assert (trainer.steps, trainer.pending.samples, trainer.clear()) == (1, 0, 0)
    assert (trainer.counts.received, trainer.counts.trained, trainer.counts.dropped) == (4, 3, 1)
    works = (
        trainer.step, trainer.state_dict, trainer.draft_weights, trainer.__enter__,
        lambda: trainer.add(**online.sample(kept_policy, trainer, 1)),
        lambda: trainer.evaluate([]),
        lambda: trainer.update_target(kept_policy),
        lambda: trainer.load_state_dict(state),
        lambda: trainer.export(tmp_path / "draft"),
    )  # fmt: skip
    for work in works:
        with pytest.raises(ClosedError, match="has been closed"):
            work()
    again = online.make(kept_policy)
    again.load_state_dict(state)
    assert all(torch.equal(tensor, dict(again.draft_weights())[name]) for name, tensor in weights)


def test_weights_that_were_handed_out_stay_what_they_were(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """A serving side may load them while the next step is taken, and may write to them."""
    trainer, alone = online.make(kept_policy), online.make(kept_policy)
    for number in range(6):
        for each in (trainer, alone):
            each.add(**online.sample(kept_policy, each, number))
    first = dict(trainer.draft_weights())
    kept = {name: tensor.clone() for name, tensor in first.items()}
    later = trainer.draft_weights()  # not looked at before the step
    trainer.step()
    assert all(torch.equal(kept[name], tensor) for name, tensor in later)
    changed = [name for name, tensor in trainer.draft_weights() if not torch.equal(kept[name], tensor)]
    assert len(changed) > 5
    for tensor in first.values():
        tensor.zero_()
    alone.step()
    assert online.figures(trainer.step()) == online.figures(alone.step())


def test_only_precisions_of_weights_are_written(
    kept_policy: PreTrainedModel, online: ModuleType, tmp_path: Path
) -> None:
    trainer = online.make(kept_policy)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(ConfigError, match="dtype: is no precision of weights"):
            trainer.draft_weights(dtype=dtype)
        with pytest.raises(ConfigError, match="dtype: is no precision of weights"):
            trainer.export(tmp_path / "draft", dtype=dtype)
    assert not (tmp_path / "draft").exists()
