"""`train --dry-run`: everything a run would do and need, checked and explained, without loading weights or training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from torchspec.core import registry
from torchspec.core.config.fields import settings as setting_paths
from torchspec.core.config.schema import RunConfig
from torchspec.core.data.report import DatasetSettings
from torchspec.core.data.rows import BadRow
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.device import DeviceSpec
from torchspec.core.models.target_quantisation import described as described_quantisation
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.assembly import initial_path
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.draft_shapes import draft_of_shapes
from torchspec.core.pipeline.engine_setup import unserved
from torchspec.core.pipeline.parallel_fit import choose_exchange, choose_logits
from torchspec.core.pipeline.plan_advice import fit_of
from torchspec.core.pipeline.plan_engine import EngineFit, engine_fit
from torchspec.core.pipeline.plan_fit import Fit, aligned
from torchspec.core.pipeline.plan_load import Subject, cached_tokens, lengths_of
from torchspec.core.pipeline.plan_texts import RowSample, Texts, cached_texts, sampled_texts
from torchspec.core.pipeline.plan_time import TimePlan
from torchspec.core.pipeline.plan_work import Planned, plan_time
from torchspec.core.pipeline.preflight import Checked, check
from torchspec.core.training.checkpoint_files import steps_on_disk
from torchspec.core.training.fp8 import described, emulation, gathering_of, scaling_of
from torchspec.core.training.schedule import Schedule, warmup_warning

SHOWN_BAD_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run comes to. Sections are flat and JSON; `notes` are worth a look and no errors; what is `absent` the run
    needs and this machine lacks, so that the plan is one for another machine."""

    run: dict[str, Any]
    target: dict[str, Any]
    draft: dict[str, Any]
    data: dict[str, Any]
    steps: dict[str, Any]
    memory: Fit
    engine: EngineFit | None
    time: TimePlan
    settings: list[dict[str, Any]]
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        engine = None if self.engine is None else self.engine.to_json()
        return {**asdict(self), "memory": self.memory.to_json(), "engine": engine, "time": self.time.to_json()}

    def to_text(self) -> str:
        """For people: one block per section."""
        lines: list[str] = []
        if self.absent:
            lines += [
                "planned for another machine: this one cannot run it",
                *(f"  - {each}" for each in self.absent),
                "",
            ]
        # The longest first, so that on a screen the end is what was asked for: does it fit, and how long will it take?
        values = [(row["path"], _shown(row["value"]), f"from {row['source']}") for row in self.settings]
        lines += ["settings", *aligned(values), ""]
        for title in ("run", "target", "draft", "data", "steps"):
            section: dict[str, Any] = getattr(self, title)
            lines += [title, *aligned([(key, _shown(value), "") for key, value in section.items()]), ""]
        lines += [*self.memory.lines(), ""]
        lines += [] if self.engine is None else [*self.engine.lines(), ""]
        lines += self.time.lines()
        lines += ["", "notes", *(f"  - {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # null, true, false: as a setting is given
    return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value)


def make_plan(config: RunConfig, provenance: Mapping[str, str], ranks: Ranks | None = None) -> Plan:
    """Work out a run. Raises ConfigError with every problem found."""
    ranks = ranks or Ranks()
    checked = check(config, ranks, to_run=False)
    config, provenance = checked.config, {**provenance, **checked.sources}
    device, target, weights, algorithm = checked.device, checked.target, checked.weights, checked.algorithm
    cached = cached_tokens(config, checked.reader, checked.tokenizer)
    lengths, rows = None if cached is None else cached[1], RowSample()
    data = _data(checked, lengths, rows)
    steps = _steps(config, data)
    draft = draft_of_shapes(algorithm, target)
    parameters = [p for p in draft.parameters() if p.requires_grad]
    subject = checked.subject(lengths_of(lengths))
    if cached is None:
        texts = sampled_texts(rows, checked.tokenizer, DatasetSettings.of_training(config))
    else:
        texts = cached_texts(*cached)
    return Plan(
        run=_run(config, device, ranks.all),
        target={
            "path": str(target.path),
            "architecture": target.architecture,
            "layers": target.num_layers,
            "hidden size": target.hidden_size,
            "vocabulary": target.vocab_size,
            "parameters": sum(math.prod(weights.shape(name)) for name in weights.files),
            "precision": str(subject.dtype).removeprefix("torch."),
            **({} if weights.quantisation is None else {"quantised": described_quantisation(weights.quantisation)}),
        },
        draft={
            "algorithm": algorithm.name,
            "trained parameters": sum(p.numel() for p in parameters),
            "taps (target layers)": list(algorithm.taps),
            "vocabulary": algorithm.vocabulary_size,
            "starts from": str(initial_path(config) or "random weights"),
            **{name: " x ".join(map(str, p.shape)) for name, p in draft.named_parameters()},
        },
        data=data,
        steps=steps,
        memory=fit_of(config, ranks, subject),
        engine=engine_fit(config, subject, weights),
        time=_time(checked, subject, ranks, steps, texts),
        absent=list(checked.absent),
        settings=_settings(config, provenance),
        notes=_notes(checked, data, steps, ranks.all),
    )


def _data(checked: Checked, lengths: torch.Tensor | None, rows: RowSample) -> dict[str, Any]:
    """Counts: exact where the data has been tokenised before, else of rows, before any is filtered. `rows` are then
    told of each."""
    config, reader = checked.config, checked.reader
    facts: dict[str, Any] = {"train": [str(file) for file in config.data.train]}
    if config.data.validation:
        facts["validation"] = [str(file) for file in config.data.validation]
    if lengths is not None:
        return {
            **facts,
            "samples": lengths.numel(),
            "tokens": int(lengths.sum()),
            "longest sample": int(lengths.max()),
            "counted": "exactly, from the cache",
        }
    usable = bad = 0
    first: list[BadRow] = []
    for row in reader:
        if isinstance(row, BadRow):
            bad += 1
            first += [row] if len(first) < SHOWN_BAD_ROWS else []
        else:
            usable += 1
            rows.look(row)
    if not usable:
        shown = "".join(f"\n{row}" for row in first)
        message = f"no row can be used, of {bad} read{shown}"
        raise ConfigError([Problem(field="data.train", message=message)])
    return {**facts, "samples": usable, "bad rows": bad, "counted": "rows, before tokenising and filtering"}


def _steps(config: RunConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    per_epoch = math.ceil(data["samples"] / config.train.batch_size)
    planned = per_epoch * config.train.epochs
    total = min(planned, config.train.max_steps or planned)
    return {
        "per epoch": per_epoch,
        "total": total,
        "warm-up": min(Schedule.of(config.train).warmup_updates(total), total),
        "checkpoints": math.ceil(total / config.train.checkpoint_every),
        "validations": 0 if not config.data.validation else _validations(total, config.eval.every),
        "samples per step": config.train.batch_size,
    }


def _validations(total: int, every: int) -> int:
    return math.ceil(total / every) if every else 1


def _time(checked: Checked, subject: Subject, ranks: Ranks, steps: Mapping[str, Any], texts: Texts | None) -> TimePlan:
    saved = steps_on_disk(checked.config.output / run_dir.CHECKPOINTS)
    planned = Planned(
        config=checked.config,
        subject=subject,
        weights=checked.weights,
        ranks=ranks,
        per_epoch=steps["per epoch"],
        steps=steps["total"],
        done=min(saved[-1], steps["total"]) if saved else 0,
    )
    return plan_time(planned, texts)


def _run(config: RunConfig, device: DeviceSpec, ranks: int) -> dict[str, Any]:
    steps = steps_on_disk(config.output / run_dir.CHECKPOINTS)
    return {
        "output": str(config.output),
        "device": device.name,
        "backend": config.backend,
        "ranks": ranks,
        "compute precision": config.precision.compute,
        "continues from": f"the checkpoint of step {steps[-1]}" if steps else "nothing: a new run",
    }


def _settings(config: RunConfig, provenance: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"path": path, "value": _value(config, path), "source": provenance.get(path, "default")}
        for path in setting_paths(type(config))
    ]


def _value(config: RunConfig, path: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else None
    return value


def _notes(checked: Checked, data: Mapping[str, Any], steps: Mapping[str, Any], ranks: int) -> list[str]:
    config = checked.config
    notes = [f"{path} is {_value(config, path)}: {why}" for path, why in checked.sources.items()]
    exchange, why = choose_exchange(config, checked.algorithm, ranks, data.get("longest sample"))
    if why:
        notes.append(f"parallel.exchange is {exchange}: {why}")
    if ranks // (config.parallel.ulysses * config.parallel.ring) > config.train.batch_size:
        notes.append(f"{ranks} ranks share batches of {config.train.batch_size} samples: some have nothing to do")
    if (warning := warmup_warning(config.train, steps["total"])) is not None:
        notes.append(warning)
    if config.precision.compute == "fp8":
        in_parts = choose_logits(config)[0] == "vocabulary"
        gather = gathering_of(config.precision, ranks, head_in_parts=in_parts)
        draft = draft_of_shapes(checked.algorithm, checked.target)
        notes.append(described(draft, scaling_of(config.precision), gather))
        if registry.probe(checked.device).ok and (emulated := emulation(checked.device.load())) is not None:
            notes.append(emulated)
    if (refusal := unserved(config, checked.algorithm)) is not None:
        notes.append(refusal)
    if checked.quantised is not None:
        notes.append(f"the target is quantised: {checked.quantised}")
    if not config.data.validation:
        notes.append("no data.validation: no decoding during the run, and no checkpoint is the best one")
    if data.get("bad rows"):
        notes.append(f"{data['bad rows']} rows cannot be used; training reports each with file, line and reason")
    return notes
