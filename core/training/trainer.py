"""The training loop: windows of the global batches, one optimizer update each, with validation and checkpoints.

A *step* is one window: a batch of samples over all ranks. An *update* is a step that changed the parameters. The two
differ by the windows without supervision (denominator 0), which are counted, logged and leave the schedule, the
optimizer and the parameters as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from torchspec.core.config.schema import TrainConfig
from torchspec.core.errors import NonFiniteError, TargetError
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training import checkpoint
from torchspec.core.training.capturing import Documents, Model, Samples
from torchspec.core.training.checkpoint_files import directory_of, steps_on_disk
from torchspec.core.training.feed import DirectFeed, Feed
from torchspec.core.training.host_memory import release_heap
from torchspec.core.training.ledger import ledger_row
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.plan import Cut, Plan, Shares
from torchspec.core.training.random_state import draw_of, untouched
from torchspec.core.training.served import ServedChecks
from torchspec.core.training.signals import StopRequest
from torchspec.core.training.timing import StepTimer
from torchspec.core.training.update import Progress, Updater
from torchspec.core.training.window import WindowResult, run_window

logger = logging.getLogger(__name__)

ProgressSink = Callable[[str, int, int], None]
NAMED_SAMPLES = 16
RELEASE_EVERY = 100
"""Steps between two times that the heap is trimmed."""
LEAST_QUARANTINED = 4
"""From so many on, a run in which more samples cannot be captured than can is stopped."""
LOST_WINDOWS = 4
"""So is one of which not a single sample could be captured for so many steps on end."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, on what, and where it is kept.

    `validate` decodes with the draft as it is and returns a metrics row holding `acceptance_length`; None: not here.
    `serve`: checkpoints are validated in a serving engine instead, by `served`, which the main rank has.
    `validate_every` 0: only at the end. `alike`: see `Plan`. `on_policy`: the target writes the answers; `push`,
    collective, hands it the draft after a step, every `push_every` steps.
    """

    config: TrainConfig
    seed: int
    bucket_size: int
    checkpoints: Path
    facts: dict[str, Any]
    vocabulary: VocabularyMap
    validate: Callable[[], dict[str, Any]] | None = None
    validate_every: int = 0
    serve: bool = False
    served: ServedChecks | None = None
    alike: Sequence[int] | None = None
    on_policy: bool = False
    push: Callable[[int], None] | None = None
    push_every: int = 1


@dataclass(kw_only=True)
class Counters(Progress):
    """Everything of a run that is neither a tensor nor a random state; stored with each checkpoint."""

    samples: int = 0
    quarantined: int = 0
    tokens: int = 0
    validated_step: int = -1
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`signal` is 0 unless the run stopped early because of one."""

    step: int
    total_steps: int
    signal: int
    empty_windows: int


class Trainer:
    """Trains a sharded draft. Every rank makes one and calls the same methods."""

    def __init__(
        self, model: Model, samples: Samples, setup: Setup, context: ParallelContext, feed: Feed | None = None
    ) -> None:
        """`feed` brings the features; None: the model's engine makes them when they are needed."""
        self.model = model
        self.samples = samples
        self.setup = setup
        self.context = context
        self.counters = Counters()
        self._lost_in_a_row = 0
        self._samples_row: dict[str, Any] = {}
        self.feed = DirectFeed(model, context) if feed is None else feed
        self.plan = Plan(
            samples.lengths,
            self._cut_of(setup.config),
            Shares(indices=context.captured_with, of=context.data_size),
            batch_size=setup.config.batch_size,
            bucket_size=setup.bucket_size,
            seed=setup.seed,
            alike=setup.alike,
        )
        self.updater = Updater(model, setup.config)
        planned = self.steps_per_epoch * setup.config.epochs
        self.total_steps = min(planned, setup.config.max_steps or planned)

    @property
    def optimizer(self) -> Optimizer:
        return self.updater.optimizer

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def resume(self, directory: Path) -> None:
        """Continue from a whole checkpoint: weights, optimizer, counters and this rank's random states."""
        tensors = self.updater.tensors()
        progress = checkpoint.load(directory, tensors, self.setup.facts, self.context)
        self.updater.filled(tensors, checkpoint.own_tensors(directory, self.context))
        self.counters = Counters(**progress)
        if self.setup.served is not None:
            self.setup.served.forget_after(self.counters.step)

    def run(
        self,
        log: MetricsLog,
        stop: StopRequest,
        progress: ProgressSink | None = None,
        ledger: MetricsLog | None = None,
    ) -> Outcome:
        """Train to the end, or to the end of the step in which a signal arrived; both leave a checkpoint.

        `ledger` gets a row for every step: what became of its samples."""
        config, counters = self.setup.config, self.counters
        received = 0
        self.feed.start(self.plan, self.samples, counters.step, self.total_steps)
        if progress is not None:  # the first step may have something to compile
            progress("train", counters.step, self.total_steps)
        if self._validation_due():  # the run ended between this step's checkpoint and its validation
            received = self._validate(log, stop)
        while counters.step < self.total_steps and not received:
            with self._profile():
                row = self._step()
            if ledger is not None:
                ledger.write(self._samples_row)
            if counters.step % config.log_every == 0 or counters.step == self.total_steps:
                log.write(row)
            if progress is not None:
                progress("train", counters.step, self.total_steps)
            if self.setup.push is not None and counters.step % self.setup.push_every == 0:
                self.setup.push(counters.step)
            if counters.step % RELEASE_EVERY == 0:
                release_heap()
            received = self._agreed_signal(stop)
            due = self._validation_due() and not received
            serve = self._serving_due() and not received
            last = counters.step == self.total_steps
            if received or due or serve or last or counters.step % config.checkpoint_every == 0:
                self._save()  # before the validation, which may fail or outlast the time after a signal
            if due:
                received = self._validate(log, stop)
            if serve:
                self.context.main_only(self._serve)
            self._collect(log)
        if self.setup.serve and not received:
            received = self._await_served(log, stop)
        return Outcome(
            step=counters.step,
            total_steps=self.total_steps,
            signal=received,
            empty_windows=counters.empty_windows,
        )

    def _cut_of(self, config: TrainConfig) -> Cut:
        """Packed rows hold `tokens_per_rank` tokens of each rank that shares them."""
        return Cut.of(
            config,
            parameters=sum(p.numel() for p in self.model.draft.parameters() if p.requires_grad),
            hidden=self.model.head.embedding_VH.shape[1],
            ranks=self.context.sequence_size,
        )

    def _profile(self) -> AbstractContextManager[None]:
        """Around the step that is to be recorded."""
        if self.counters.step + 1 != self.setup.config.profile_step:
            return nullcontext()
        directory = self.setup.checkpoints.parent / "profile" / f"rank{self.context.rank}"
        return self.context.device.runtime.profile(directory)

    def _step(self) -> dict[str, Any]:
        """One window; its metrics row."""
        counters = self.counters
        batch = self.plan.batch(counters.step)
        self.context.device.runtime.reset_peak_memory()
        timer = StepTimer(self.context.torch_device)
        turns = self.plan.turns(counters.step)
        result = run_window(self.model, self.samples, turns, self.feed, self.context, timer, self._moment)
        quarantined = self._quarantine(result, batch)
        with timer.phase("optimizer"):
            rate, norm = self.updater.update(
                result.sums, counters, self.total_steps, lambda norm: self._refuse(result, batch, norm)
            )
        counters.step += 1
        counters.samples += len(batch) - len(quarantined)
        counters.quarantined += len(quarantined)
        counters.tokens += result.sums.tokens
        counters.score = None
        phases, seconds = timer.finish()
        epoch = (counters.step - 1) // self.steps_per_epoch
        flow = self.feed.flow() if self.context.is_main else None
        self._samples_row = ledger_row(counters.step, epoch, batch, result.quarantined)
        return {
            "kind": "train",
            "step": counters.step,
            "epoch": epoch,
            "samples": counters.samples,
            "tokens": counters.tokens,
            "empty_windows": counters.empty_windows,
            **({"quarantined": quarantined} if quarantined else {}),
            **self.updater.summary(result.sums),
            "lr": rate,
            "grad_norm": norm,
            "padding_fraction": 1 - result.sums.tokens / max(1, result.sums.positions),
            "tokens_per_second": result.sums.tokens / seconds,
            "step_seconds": seconds,
            "time": phases,
            "memory": self._memory(),
            **({} if flow is None else {"pipeline": asdict(flow)}),
            **({"on_policy": result.sums.written.to_json()} if self.setup.on_policy else {}),
        }

    def _quarantine(self, result: WindowResult, batch: Sequence[int]) -> dict[str, str]:
        """Sample -> why it could not be captured, for the step's row; TargetError when that happens to most of them."""
        found = {self.samples[index].sample_id: reason for index, reason in sorted(result.quarantined.items())}
        for sample_id, reason in found.items():
            logger.warning("sample %s is left out of its step: %s", sample_id, reason)
        counters = self.counters
        lost = counters.quarantined + len(found)
        trained = counters.samples + len(batch) - len(found)
        whole = bool(found) and len(found) == len(batch)
        self._lost_in_a_row = self._lost_in_a_row + 1 if whole else 0
        if found and lost >= LEAST_QUARANTINED and (lost > trained or self._lost_in_a_row >= LOST_WINDOWS):
            raise TargetError(
                f"step {counters.step + 1}: {lost} samples could not be captured so far and {trained} could, so "
                f"something is wrong with the engine or the target rather than with samples. The last reason: {reason}"
            )
        return found

    def _moment(self, documents: Documents) -> Moment:
        """Of a micro-batch of the step that comes."""
        counters = self.counters
        epoch = counters.step // self.steps_per_epoch
        draws = [draw_of(self.setup.seed, epoch, sample.sample_id) for sample in documents.samples]
        return self.updater.moment(counters, counters.step / self.total_steps, draws)

    def _memory(self) -> dict[str, int]:
        """Bytes, of the rank that used most."""
        stats = self.context.device.runtime.memory()
        allocated, peak, total = self.context.max([stats.allocated, stats.peak, stats.total])
        return {"allocated": allocated, "peak": peak, "total": total}

    def _refuse(self, result: WindowResult, batch: Sequence[int], norm: float) -> NoReturn:
        """Name the step and the samples of the micro-batches whose own loss is not finite; all of them if none is."""
        mine = [i for indices, numerator in result.numerators if not torch.isfinite(numerator) for i in indices]
        suspects = sorted({index for part in self.context.gather(mine) for index in part}) or list(batch)
        named = ", ".join(self.samples[index].sample_id for index in suspects[:NAMED_SAMPLES])
        more = f" and {len(suspects) - NAMED_SAMPLES} more" if len(suspects) > NAMED_SAMPLES else ""
        loss = result.sums.numerator / result.sums.denominator
        raise NonFiniteError(
            f"step {self.counters.step + 1}: loss {loss}, gradient norm {norm}; the parameters were not updated. "
            f"Samples concerned: {named}{more}. Look at these samples, or lower train.lr or train.clip_norm, and start "
            f"again{self._where_again()}"
        )

    def _where_again(self) -> str:
        """Where the next start would begin, and that it may be too late there."""
        steps = steps_on_disk(self.setup.checkpoints)
        if not steps:
            return ": there is no checkpoint yet, so from the beginning"
        return (
            f" from the checkpoint of step {steps[-1]}. If the loss was running away by then, no rate helps: move "
            f"{directory_of(self.setup.checkpoints, steps[-1])} away and an earlier one is used, or name another output"
        )

    def _agreed_signal(self, stop: StopRequest) -> int:
        """The signal any rank has received; the same answer on every rank."""
        return self.context.max([stop.received])[0]

    def _validation_due(self) -> bool:
        step, every = self.counters.step, self.setup.validate_every
        if self.setup.validate is None or step == 0 or self.counters.validated_step == step:
            return False
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _serving_due(self) -> bool:
        step, every = self.counters.step, self.setup.validate_every
        return self.setup.serve and step > 0 and (step == self.total_steps or (every > 0 and step % every == 0))

    def _serve(self) -> None:
        assert self.setup.served is not None
        self.setup.served.start(self.counters.step)

    def _collect(self, log: MetricsLog) -> None:
        """What the serving engine has found meanwhile; only the main rank knows."""
        if self.setup.served is not None:
            for row in self.setup.served.collect():
                log.write(self._served_row(row))

    def _await_served(self, log: MetricsLog, stop: StopRequest) -> int:
        """Until every checkpoint that is queued has been measured; -> a signal that arrived meanwhile."""

        def wait() -> None:
            assert self.setup.served is not None
            if self._serving_due():  # a run that ended before its last measurement did
                self._serve()
            for row in self.setup.served.wait(lambda: bool(stop.received)):
                log.write(self._served_row(row))

        self.context.main_only(wait)
        return self._agreed_signal(stop)

    def _served_row(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "epoch": (row["step"] - 1) // self.steps_per_epoch}

    def _validate(self, log: MetricsLog, stop: StopRequest) -> int:
        """Decode and log; -> a signal that arrived meanwhile.

        The step's checkpoint is there and is replaced by one that knows the score where that will be asked for;
        elsewhere a run that resumes from it validates once more.
        """
        assert self.setup.validate is not None
        with untouched(self.context.device.runtime):
            row = self.setup.validate()
        counters = self.counters
        step = counters.step
        log.write({"kind": "validation", "step": step, "epoch": (step - 1) // self.steps_per_epoch, **row})
        counters.validated_step = step
        counters.score = float(row["acceptance_length"])
        received = self._agreed_signal(stop)
        if received or step == self.total_steps or self._improved():
            self._save()
        return received

    def _improved(self) -> bool:
        """The step was validated and is better than every checkpoint there is."""
        if self.counters.score is None:
            return False
        best = self.context.broadcast(checkpoint.best_score(self.setup.checkpoints) if self.context.is_main else None)
        return best is None or self.counters.score > best

    def _save(self) -> None:
        snapshot = checkpoint.Snapshot(
            step=self.counters.step,
            tensors=self.updater.tensors(),
            own=self.updater.codes(),
            progress=asdict(self.counters),
            facts=self.setup.facts,
            vocabulary=self.setup.vocabulary,
            score=self.counters.score,
        )
        checkpoint.save(self.setup.checkpoints, snapshot, self.context, self.setup.config.keep_last)
