"""What the loop does beside gradients: optimizer arithmetic, empty windows, refusals, rows, validation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.config.schema import EvalConfig
from torchspec.core.data.prompts import Prompt
from torchspec.core.errors import NonFiniteError
from torchspec.core.interfaces.algorithm import StepResult
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.random_state import untouched
from torchspec.core.training.schedule import Schedule
from torchspec.core.training.sharding import local, unsharded_state
from torchspec.core.training.signals import StopRequest
from torchspec.core.training.validation import Validator


def run(trainer: Any, directory: Path) -> list[dict[str, Any]]:
    directory.mkdir(exist_ok=True)
    with MetricsLog(directory / "metrics.jsonl") as log, StopRequest() as stop:
        trainer.run(log, stop)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_updates_are_adamw_with_decay_on_matrices_and_clipping(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    """Three updates against AdamW written out from its definition (1711.05101, algorithm 2) in float64."""
    config = {"weight_decay": 0.3, "betas": [0.8, 0.9], "lr": 0.05, "clip_norm": 0.05, "schedule": "cosine"}
    trainer = tiny.make_trainer(tiny.Job(directory=tmp_path, config=config, dtype=torch.float64), context)
    parameters = dict(trainer.model.draft.named_parameters())
    seen: list[dict[str, Tensor]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: local(p.grad).clone() for name, p in parameters.items()})
    )
    values = {name: local(p.detach()).clone() for name, p in parameters.items()}
    rows = [trainer._step() for _ in range(3)]
    schedule = Schedule.of(trainer.setup.config)
    first, second = ({name: torch.zeros_like(v) for name, v in values.items()} for _ in range(2))
    for t, grads in enumerate(seen, start=1):
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        assert norm == pytest.approx(0.05, rel=1e-4)
        assert rows[t - 1]["grad_norm"] > 0.05
        rate = 0.05 * schedule.factor(t - 1, trainer.total_steps)
        assert rows[t - 1]["lr"] == rate
        for name, value in values.items():
            decay = 0.3 if value.ndim == 2 else 0.0
            first[name] = 0.8 * first[name] + 0.2 * grads[name]
            second[name] = 0.9 * second[name] + 0.1 * grads[name] ** 2
            moment, spread = first[name] / (1 - 0.8**t), second[name] / (1 - 0.9**t)
            values[name] = value - rate * decay * value - rate * moment / (spread.sqrt() + 1e-8)
    for name, value in values.items():
        assert torch.allclose(local(parameters[name].detach()), value, rtol=0, atol=1e-12), name


def test_empty_windows_are_counted_and_leave_the_schedule_alone(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    samples = tiny.TinySamples(count=8, unsupervised=[0, 2, 3, 5])
    config = {"batch_size": 1, "micro_batch_size": 1, "schedule": "cosine", "warmup_steps": 0}
    job = tiny.Job(directory=tmp_path, config=config, samples=samples)
    rows = run(tiny.make_trainer(job, context), tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    empty = [row for row in rows if row["lr"] is None]
    assert len(empty) == rows[-1]["empty_windows"] == 4
    assert all(row["loss"] is None and row["grad_norm"] is None for row in empty)
    rates = [row["lr"] for row in rows if row["lr"] is not None]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.02
    assert tiny.make_trainer(job, context).counters.updates == 0


def overlap_losses(tiny: ModuleType, trainer: Any, state: dict[str, Tensor], batch: list[int]) -> Tensor:
    """[K, 3] in float64: of each step the sums of cross-entropy to the text and of its alpha, and how many they are."""
    target, found_K3 = tiny.RecurrentTarget(torch.float64), torch.zeros(tiny.K, 3, dtype=torch.float64)
    for index in batch:
        sample = trainer.samples[index]
        taps_TNH, _ = target.states(sample.input_ids_T.tolist(), target.zero())
        for i in range(sample.input_ids_T.numel()):
            hidden_H = torch.tanh(state["fc.weight"] @ taps_TNH[i].flatten()) * state["norm"]
            for k in range(tiny.K):
                j = i + 1 + k
                if j < sample.input_ids_T.numel() and sample.loss_mask_T[j]:
                    log_q = (state[f"heads.{k}.weight"] @ hidden_H).log_softmax(0)[sample.input_ids_T[j]]
                    found_K3[k] += torch.stack((-log_q, log_q.exp(), torch.ones_like(log_q)))
    return found_K3


def test_a_gradient_is_that_of_the_mean_over_the_window(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    """In micro-batches, against autograd through the mean loss, written out from its definition."""
    job = tiny.Job(directory=tmp_path, dtype=torch.float64, config={"micro_batch_size": 2})
    trainer = tiny.make_trainer(job, context)
    state = {name: value.requires_grad_() for name, value in unsharded_state(trainer.model.draft).items()
             if value.is_floating_point()}  # fmt: skip
    cross_K, _, count_K = overlap_losses(tiny, trainer, state, trainer.plan.batch(0)).unbind(1)
    weights_K = torch.tensor(tiny.STEP_WEIGHTS, dtype=torch.float64)
    loss = (weights_K * cross_K).sum() / (weights_K * count_K).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = math.sqrt(sum(float(value.grad.square().sum()) for value in state.values() if value.grad is not None))
    row = trainer._step()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-10)


def test_lk_lambda_weighs_by_the_last_window_that_taught_anything(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    """Losses from the definition (2602.23881), with windows of two samples of which some teach nothing, and a ramp."""
    objective = {"lk_lambda": 0.7, "tv": {"start": 0.1, "end": 0.5, "until": 0.5}}
    samples = tiny.TinySamples(count=16, unsupervised=[n for n in range(16) if n % 8 not in (1, 2, 4)])
    config = {"batch_size": 2, "micro_batch_size": 1, "lr": 0.3}
    job = tiny.Job(directory=tmp_path, config=config, dtype=torch.float64, samples=samples, objective=objective)
    trainer = tiny.make_trainer(job, context)
    alpha_K, kinds = torch.zeros(tiny.K, dtype=torch.float64), []
    for step in range(trainer.total_steps):
        tv = 0.1 + 0.4 * min(1.0, step / trainer.total_steps / 0.5)
        cross_K, overlap_K, count_K = overlap_losses(
            tiny, trainer, unsharded_state(trainer.model.draft), trainer.plan.batch(step)
        ).unbind(1)  # fmt: skip
        row = trainer._step()
        kinds.append(row["loss"] is None)
        if not count_K.any():
            assert row["loss"] is None
            continue
        lambda_K = torch.exp(-3.0 * alpha_K)
        missed_K = count_K - overlap_K
        loss_K = 0.7 * lambda_K * cross_K + (0.7 * (1 - lambda_K) + tv) * missed_K
        decay_K = torch.tensor(tiny.STEP_WEIGHTS, dtype=torch.float64)
        assert row["loss"] == pytest.approx(float((decay_K * loss_K).sum() / (decay_K * count_K).sum()), rel=1e-12)
        alpha_K = overlap_K / count_K
    assert (True, False) in set(pairwise(kinds)), "a window without supervision, then one with"
    assert alpha_K.min() > 0.02


class Poisoned:
    """Makes the loss of one sample something else."""

    def __init__(self, inner: Any, sample: int, factor: float, samples: Any) -> None:
        self.inner, self.factor = inner, factor
        self.length, self.tokens = samples.lengths[sample], samples[sample].input_ids_T

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, draft: Any, head: Any, rows: Any, device: Any, memory: Any, moment: Any) -> StepResult:
        result: StepResult = self.inner.step(draft, head, rows, device, memory, moment)
        lengths = (rows.tokens.document_BT >= 0).sum(-1).tolist()
        documents = [ids_T[:length] for ids_T, length in zip(rows.tokens.input_ids_BT, lengths, strict=True)]
        if any(torch.equal(ids_T, self.tokens) for ids_T in documents):
            return replace(result, numerator=result.numerator * self.factor)
        return result


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_before_the_update_and_names_step_and_samples(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path, factor: float
) -> None:
    trainer = tiny.make_trainer(tiny.Job(directory=tmp_path, config={"micro_batch_size": 1}), context)
    bad = trainer.plan.batch(1)[2]
    algorithm = Poisoned(trainer.model.algorithm, bad, factor, trainer.samples)
    trainer.model = replace(trainer.model, algorithm=algorithm)
    trainer._step()
    before = unsharded_state(trainer.model.draft)
    said = rf"step 2: loss (nan|inf).*Samples concerned: row-{bad}\. .*there is no checkpoint yet"
    with pytest.raises(NonFiniteError, match=said):
        trainer._step()
    after = unsharded_state(trainer.model.draft)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (trainer.counters.step, trainer.counters.updates) == (1, 1)
    trainer._save()
    with pytest.raises(NonFiniteError, match=r"again from the checkpoint of step 1\. If the loss was running away"):
        trainer._step()


def test_max_steps_and_log_every(tiny: ModuleType, context: ParallelContext, tmp_path: Path) -> None:
    job = tiny.Job(directory=tmp_path, config={"epochs": 9, "max_steps": 5, "log_every": 3})
    trainer = tiny.make_trainer(job, context)
    rows = run(trainer, tmp_path)
    assert [row["step"] for row in rows] == [3, 5]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[-1]["samples"] == 13 + sum(len(trainer.plan.batch(trainer.steps_per_epoch + n)) for n in range(2))


def test_one_step_is_recorded(tiny: ModuleType, context: ParallelContext, tmp_path: Path) -> None:
    """And computes what it would have."""
    losses = []
    for name, wanted in (("plain", {}), ("profiled", {"profile_step": 2})):
        job = tiny.Job(directory=tmp_path / name, config={"max_steps": 3, **wanted})
        losses.append([row["loss"] for row in run(tiny.make_trainer(job, context), tmp_path / name)])
    assert losses[0] == losses[1]
    traces = list((tmp_path / "profiled").rglob("trace.json"))
    assert traces == [tmp_path / "profiled" / "profile" / "rank0" / "trace.json"]


def test_a_draft_that_hides_its_output_is_refused(tiny: ModuleType, context: ParallelContext, tmp_path: Path) -> None:
    """FSDP would leave its gradients unreduced, without a word."""

    class Hidden:
        def __init__(self, value: Any) -> None:
            self.value = value

    trainer = tiny.make_trainer(tiny.Job(directory=tmp_path), context)
    draft = trainer.model.draft
    forward = type(draft).forward
    algorithm = trainer.model.algorithm

    class Unwrapping:
        def __getattr__(self, name: str) -> Any:
            return getattr(algorithm, name)

        def step(self, module: Any, *rest: Any) -> StepResult:
            return algorithm.step(lambda *inputs: module(*inputs).value, *rest)  # type: ignore[no-any-return]

    draft.forward = lambda *inputs: Hidden(forward(draft, *inputs))
    trainer.model = replace(trainer.model, algorithm=Unwrapping())
    with pytest.raises(TypeError, match="was not reduced over ranks"):
        trainer._step()


def validator(tiny: ModuleType, context: ParallelContext, trainer: Any, **changes: Any) -> Validator:
    prompts = [Prompt(sample_id=f"p{n}", input_ids=tuple(range(n, n + 3))) for n in range(5)]
    settings = EvalConfig(**({"max_new_tokens": 12, "draft_length": 2} | changes))
    return Validator(
        model=trainer.model,
        vocabulary=VocabularyMap.identity(tiny.V),
        prompts=prompts,
        skipped=0,
        settings=settings,
        seed=0,
        compute="float32",
        context=context,
    )


def test_validation_decodes_for_real_and_disturbs_nothing(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    """Acceptance recounted by hand from the target's own text, and the same random numbers afterwards."""
    trainer = tiny.make_trainer(tiny.Job(directory=tmp_path, config={"epochs": 8}), context)
    for _ in range(20):
        trainer._step()
    validate = validator(tiny, context, trainer)
    expected = torch.random.get_rng_state()
    with untouched(context.device.runtime):
        row = validate()
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert validate() | {"seconds": 0, "tokens_per_second": 0} == row | {"seconds": 0, "tokens_per_second": 0}

    target, draft = tiny.RecurrentTarget(), validate._copy()
    rounds = accepted = 0
    for prompt in validate.prompts:
        text = list(prompt.input_ids)
        text += target.generate([text], max_new_tokens=1)[0]
        while len(text) < len(prompt.input_ids) + 12:
            taps_TNH, _ = target.states(text[:-1], target.zero())
            guess = int(draft.heads[1](draft.hidden(taps_TNH[-1:])).argmax())
            true = target.generate([text], max_new_tokens=3)[0]
            hits = 0 if guess != true[0] else (2 if guess == true[1] else 1)
            text += true[: hits + 1]
            rounds, accepted = rounds + 1, accepted + hits
    assert (row["rounds"], row["accepted"]) == (rounds, accepted)
    assert row["acceptance_length"] == 1 + accepted / rounds == 1 + sum(row["acceptance_per_position"])


def test_validation_rows_and_best_checkpoint(tiny: ModuleType, context: ParallelContext, tmp_path: Path) -> None:
    """Validated at 4, 8, 12 and at the end; the best stays although newer ones push it out."""
    scores = {4: 1.2, 8: 1.9, 12: 1.4, 14: 1.9}
    job = tiny.Job(directory=tmp_path, config={"max_steps": 14, "epochs": 9, "checkpoint_every": 5, "keep_last": 1})
    trainer = tiny.make_trainer(
        job, context, lambda: {"acceptance_length": scores[trainer.counters.step]}, validate_every=4
    )
    rows = run(trainer, tmp_path)
    assert {row["step"]: row["acceptance_length"] for row in rows if row["kind"] == "validation"} == scores
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best.json", "step_00000008", "step_00000014"]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"step": 8, "acceptance_length": 1.9, "checkpoint": "step_00000008"}


def test_validating_changes_no_loss(tiny: ModuleType, context: ParallelContext, tmp_path: Path) -> None:
    """Building the copy draws random numbers, and dropout would notice."""
    losses = []
    for every in (0, 2):
        job = tiny.Job(directory=tmp_path / str(every), config={"epochs": 2}, dropout=0.3)
        trainer = tiny.make_trainer(job, context, validate_every=every)
        if every:
            trainer.setup = replace(trainer.setup, validate=validator(tiny, context, trainer))
        rows = run(trainer, tmp_path / str(every))
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert losses[0] == losses[1]


def test_every_epoch_trains_every_sample_once_in_its_own_order(
    tiny: ModuleType, context: ParallelContext, tmp_path: Path
) -> None:
    trainer = tiny.make_trainer(tiny.Job(directory=tmp_path, config={"epochs": 3}), context)
    seen: list[int] = []
    trainer.samples = Recording(trainer.samples, seen)
    run(trainer, tmp_path)
    epochs = [seen[start : start + 13] for start in range(0, len(seen), 13)]
    assert len(epochs) == 3
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


class Recording:
    """Notes which samples are taken."""

    def __init__(self, inner: Any, seen: list[int]) -> None:
        self.inner, self.seen, self.lengths = inner, seen, inner.lengths

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        return self.inner[index]
