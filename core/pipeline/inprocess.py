"""The `inprocess` topology: each rank runs the engine and trains, in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any

from torchspec.core import registry, settings
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.export.layout import ExportContext, write_draft
from torchspec.core.export.selfcheck import Probe
from torchspec.core.interfaces.features import Quarantined
from torchspec.core.interfaces.tracker import Result
from torchspec.core.parallel import mesh
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.pipeline import assembly, run_dir
from torchspec.core.pipeline.assembly import Data, ProgressSink, Start, Target
from torchspec.core.pipeline.card import Naming, checkpoint_facts
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.engine_setup import unserved
from torchspec.core.pipeline.launch import follow_launcher
from torchspec.core.pipeline.on_policy import check_countable, resume_pushed
from torchspec.core.pipeline.planned import say_planned
from torchspec.core.pipeline.preflight import Checked, check
from torchspec.core.pipeline.rebuild import find_checkpoint, rebuild, recorded_probe
from torchspec.core.pipeline.run_dir import RunDirectory
from torchspec.core.pipeline.topology import patience_of
from torchspec.core.pipeline.topology_fit import trainer_fraction
from torchspec.core.pipeline.tracking import tracked
from torchspec.core.training import checkpoint, checkpoint_files
from torchspec.core.training.feed import Feed
from torchspec.core.training.ledger import balance, read_ledger
from torchspec.core.training.low_bit import check_low_bit
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.served import ServedCheckError
from torchspec.core.training.signals import StopRequest
from torchspec.core.training.tracking import Tracking
from torchspec.core.training.trainer import Outcome, Trainer

logger = logging.getLogger(__name__)

MARGIN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a run came to. `signal` is 0 unless it stopped early because of one; then nothing was exported.

    `acceptance_length` is the best validated one, None without validation data. `seconds` is what the steps of this
    session took, validation included; `planned` what the plan said of them, None where it could not.
    """

    directory: Path
    step: int
    total_steps: int
    signal: int
    empty_windows: int
    acceptance_length: float | None
    draft: Path | None
    report: Path | None
    seconds: float
    planned: str | None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal: an interrupted run is not to be taken for a finished one."""
        return 128 + self.signal if self.signal else 0


def train(config: RunConfig, *, provenance: Mapping[str, str], progress: ProgressSink | None = None) -> RunOutcome:
    """Train a draft into `config.output`, or continue the run there; every rank calls this.

    Under torchrun or `launch` the ranks find each other through the environment; otherwise this is the only one.
    SIGINT or SIGTERM finishes the step, writes a checkpoint and returns; the same call continues.
    Raises TorchspecError for everything a user can act on.
    """
    follow_launcher()
    _refuse_unled(config)
    place = settings.launch()
    checked = check(config, Ranks(all=place.world_size, here=place.local_world_size, launched=place.world_size > 1))
    parallel = checked.config.parallel
    context = mesh.start(
        registry.load_device(checked.device.name),
        place,
        ulysses=parallel.ulysses,
        ring=parallel.ring,
        tensor=checked.config.target.tensor_parallel,
        timeout=_deadline(checked.config),
    )
    fraction = trainer_fraction(checked.config, checked.device.device_type)
    if fraction < 1:
        context.device.runtime.limit_memory(fraction)
    if context.is_main and (refusal := unserved(checked.config, checked.algorithm)) is not None:
        logger.warning("%s", refusal)
    try:
        with mesh.lost_peers_named():
            return _train(checked, {**provenance, **checked.sources}, context, progress if context.is_main else None)
    finally:
        mesh.shutdown(context)


def _deadline(config: RunConfig) -> timedelta:
    """Of collectives: a rank may have to wait for engines, and the others then wait for it."""
    return max(mesh.DEADLINE, timedelta(seconds=patience_of(config.engine) + MARGIN_SECONDS))


def _refuse_unled(config: RunConfig) -> None:
    """ConfigError for what only `torchspec train` can start, before its ranks."""
    if settings.launcher() is not None:
        return
    remedy = "start it with `torchspec train`"
    problems = []
    if config.pipeline.topology == "disaggregated":
        message = "has engines that nobody has started"
        problems.append(Problem(field="pipeline.topology", value="disaggregated", message=message, remedy=remedy))
    if config.pipeline.topology == "colocated" and config.pipeline.multiplex == "on":
        message = "must be there before the processes that use it"
        problems.append(Problem(field="pipeline.multiplex", value="on", message=message, remedy=remedy))
    if problems:
        raise ConfigError(problems)


def _train(
    checked: Checked, provenance: Mapping[str, str], context: ParallelContext, progress: ProgressSink | None
) -> RunOutcome:
    if checked.config.train.optimizer == "adamw8bit":
        check_low_bit()
    run = context.main_only(lambda: run_dir.open_run(checked.config))
    try:
        return _train_in(run, checked, provenance, context, progress)
    finally:
        if run is not None:
            run.lock.close()


def _train_in(
    run: RunDirectory | None,
    checked: Checked,
    provenance: Mapping[str, str],
    context: ParallelContext,
    progress: ProgressSink | None,
) -> RunOutcome:
    config, algorithm = checked.config, checked.algorithm
    checkpoints = config.output / run_dir.CHECKPOINTS
    resumed = checkpoint.choose(checkpoints, context)
    assert checked.tokenizer is not None
    data = assembly.load_data(config, checked.tokenizer, context, progress)
    if config.on_policy.enabled:
        check_countable(algorithm, checked.target, data.train.token_counts_V)
    with _loaded(config, context, progress, images=data.images) as target:
        start = context.agree(lambda: assembly.find_start(config, algorithm, target.spec, data, resumed))
        longest = max(map(int, data.train.lengths))
        model = context.agree(lambda: assembly.build_model(config, algorithm, target, start, context, longest))
        setup = assembly.build_setup(config, model, target, data, start, context, progress)
        feed = context.agree(lambda: assembly.build_feed(config, model, target, context))
        trainer = Trainer(model, data.train, setup, context, feed)
        if resumed is not None:
            trainer.resume(resumed)
            logger.info("resuming at step %d of %d from %s", trainer.counters.step, trainer.total_steps, resumed)
            _tell_changes(resumed, setup.facts)
        if config.on_policy.enabled:
            context.main_only(lambda: resume_pushed(config, trainer.counters.step))
        probe = context.agree(lambda: _probe(trainer.feed, data, context))
        context.main_only(lambda: _record(run, config, provenance, trainer, data, start, probe))
        # Where somebody reads it: counting takes a second or two.
        planned = context.main_only(lambda: None if progress is None else say_planned(checked, trainer, data))
        began = time.monotonic()
        with (
            run_dir.failure_recorded(run, lambda: trainer.counters.step),
            mesh.lost_peers_named(),
            tracked(run, config, _environment(context), trainer.counters.step) as tracking,
        ):
            try:
                outcome = _run(run, trainer, progress, tracking)
            finally:
                feed.close()
                if setup.served is not None:
                    setup.served.close()
            if outcome.signal:
                name = Signals(outcome.signal).name
                logger.warning("stopped by %s after step %d, checkpoint written", name, outcome.step)
                run_dir.record_end(run, "stopped", outcome.step, name)
                return _outcome(config, outcome, finished=False, seconds=time.monotonic() - began, planned=planned)
            seconds = time.monotonic() - began
            context.main_only(lambda: _balance(run, data, outcome, trainer))
            context.main_only(lambda: _finish(run, config, target, outcome, progress))
            if tracking is not None:
                tracking.results(_results(config, trainer))
    if setup.served is not None and setup.served.failures:
        listed = "\n  - ".join(setup.served.failures)
        raise ServedCheckError(f"trained, and the draft is in {config.output / run_dir.DRAFT}, but:\n  - {listed}")
    return _outcome(config, outcome, finished=True, seconds=seconds, planned=planned)


def _tell_changes(resumed: Path, facts: dict[str, Any]) -> None:
    """Settings that may change between sessions, such as a longer run, are used and named."""
    saved = checkpoint_files.read_json(resumed / checkpoint.DRAFT)["config"]
    for section in ("train", "parallel", "eval", "precision", "target", "on_policy"):
        for line in checkpoint.differences(saved.get(section), facts["config"].get(section), section):
            logger.warning("changed since the checkpoint and used from here on: %s", line)


@contextmanager
def _loaded(
    config: RunConfig, context: ParallelContext, progress: ProgressSink | None, *, images: bool
) -> Iterator[Target]:
    """The target, closed at the end."""
    if progress is not None:
        progress("load target", 0, 1)
    context.agree(lambda: assembly.forget_engine(config, context))
    target = context.agree(lambda: assembly.load_target(config, context, images=images))
    if progress is not None:
        progress("load target", 1, 1)
    try:
        yield target
    finally:
        target.close()


def _record(
    run: RunDirectory | None,
    config: RunConfig,
    provenance: Mapping[str, str],
    trainer: Trainer,
    data: Data,
    start: Start,
    probe: Probe | None,
) -> None:
    """Everything the run directory says about this session; rank 0 only."""
    assert run is not None
    context = trainer.context
    step, total = trainer.counters.step, trainer.total_steps
    run_dir.record_session(run, config, provenance, _environment(context), step, total)
    facts = assembly.data_facts(data.train, config.data.train, start.vocabulary)
    checkpoint_files.write_json(run.path / run_dir.DATA, facts)
    if probe is not None:
        probe.save(run.path / run_dir.PROBE)


def _environment(context: ParallelContext) -> dict[str, Any]:
    return run_dir.describe_environment(context.device.name, context.torch_device, context.world_size)


def _results(config: RunConfig, trainer: Trainer) -> dict[str, Result]:
    """What the run came to, for trackers."""
    counters = trainer.counters
    counts = {name: getattr(counters, name) for name in ("step", "samples", "quarantined", "tokens")}
    best = checkpoint.best_score(config.output / run_dir.CHECKPOINTS)
    return counts if best is None else {**counts, "acceptance_length": best, "draft_length": config.eval.draft_length}


def _probe(feed: Feed, data: Data, context: ParallelContext) -> Probe | None:
    """A piece of one sample's features, which the export's self-check replays; made by rank 0's target."""
    sample = data.train[0]
    if context.target_index or sample.input_ids_T.numel() < 2:
        return None
    features = feed.whole(sample)
    return None if isinstance(features, Quarantined) else Probe.record(features)


def _run(
    run: RunDirectory | None, trainer: Trainer, progress: ProgressSink | None, tracking: Tracking | None
) -> Outcome:
    counters = trainer.counters
    log = MetricsLog(
        None if run is None else run.metrics,
        after_step=counters.step,
        validated=counters.validated_step == counters.step,
        tracker=tracking,
    )
    ledger = MetricsLog(None if run is None else run.ledger, after_step=counters.step)
    with log, ledger, StopRequest() as stop:
        return trainer.run(log, stop, progress, ledger)


def _balance(run: RunDirectory | None, data: Data, outcome: Outcome, trainer: Trainer) -> None:
    """Every row of the data accounted for; LedgerError where a sample was lost or trained twice. Rank 0 only."""
    assert run is not None
    found = balance(
        read_ledger(run.ledger),
        samples=len(data.train),
        steps=outcome.step,
        steps_per_epoch=trainer.steps_per_epoch,
    )
    report = data.train.report
    rows = {"read": report.read, "filtered": report.filtered, "unusable": report.bad_count}
    checkpoint_files.write_json(run.path / run_dir.BALANCE, {**rows, **found.to_json()})
    found.check()


def _finish(
    run: RunDirectory | None, config: RunConfig, target: Target, outcome: Outcome, progress: ProgressSink | None
) -> None:
    """Export the best (else the last) checkpoint's draft and write the report; rank 0 only."""
    from torchspec.core.report.html import write_report

    if progress is not None:
        progress("export", 0, 1)
    trusted = config.target.trust_remote_code
    best = checkpoint_files.whole_best(config.output / run_dir.CHECKPOINTS)
    chosen = find_checkpoint(best or config.output)
    rebuilt = rebuild(chosen, target=target.spec.path, trust_remote_code=trusted)
    export = ExportContext(
        head=rebuilt.head,
        device=registry.load_device("cpu"),  # the rebuilt draft and head are there, and the check is small
        probe=recorded_probe(config.output),
        card=checkpoint_facts(chosen, rebuilt.algorithm, rebuilt.target, Naming()),
    )
    layout = rebuilt.algorithm.layouts[0]
    write_draft(rebuilt.algorithm, rebuilt.draft, layout, config.output / run_dir.DRAFT, export)
    run_dir.record_end(run, "finished", outcome.step)  # before the report, which says it
    write_report(config.output)
    if progress is not None:
        progress("export", 1, 1)


def _outcome(config: RunConfig, outcome: Outcome, *, finished: bool, seconds: float, planned: str | None) -> RunOutcome:
    draft, report = config.output / run_dir.DRAFT, config.output / "report.html"
    return RunOutcome(
        directory=config.output,
        step=outcome.step,
        total_steps=outcome.total_steps,
        signal=outcome.signal,
        empty_windows=outcome.empty_windows,
        acceptance_length=checkpoint.best_score(config.output / run_dir.CHECKPOINTS),
        draft=draft if finished else None,
        report=report if finished else None,
        seconds=seconds,
        planned=planned,
    )
