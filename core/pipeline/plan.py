"""`train --dry-run`: everything a run would do and need, checked and explained, without loading weights or training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from torchspec.core.config.fields import settings as setting_paths
from torchspec.core.config.schema import RunConfig
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings
from torchspec.core.data.rows import BadRow
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import DeviceSpec
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import NormState
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_spec import running_dtype
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.assembly import initial_path, step_memory
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.parallel_fit import choose_exchange, row_tokens
from torchspec.core.pipeline.plan_memory import Load, Part, estimate
from torchspec.core.pipeline.preflight import Checked, check
from torchspec.core.training.checkpoint_files import steps_on_disk

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run comes to. Sections are flat and JSON; `notes` are worth a look and no errors."""

    run: dict[str, Any]
    target: dict[str, Any]
    draft: dict[str, Any]
    data: dict[str, Any]
    steps: dict[str, Any]
    memory: list[Part]
    settings: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """For people: one block per section."""
        lines: list[str] = []
        for title in ("run", "target", "draft", "data", "steps"):
            section: dict[str, Any] = getattr(self, title)
            lines += [title, *_aligned([(key, _shown(value), "") for key, value in section.items()]), ""]
        total = sum(part.bytes for part in self.memory)
        rows = [(part.name, _size(part.bytes), part.how) for part in self.memory]
        lines += ["memory per rank (estimate)", *_aligned([*rows, ("sum", _size(total), "")]), ""]
        values = [(row["path"], _shown(row["value"]), f"from {row['source']}") for row in self.settings]
        lines += ["settings", *_aligned(values)]
        lines += ["", "notes", *(f"  - {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def _aligned(rows: list[tuple[str, str, str]]) -> list[str]:
    first = max((len(row[0]) for row in rows), default=0)
    second = max((len(row[1]) for row in rows if len(row[1]) <= 40), default=0)
    return [f"  {a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows]


def _size(count: int) -> str:
    return f"{count / GIB:8.2f} GiB" if count >= GIB else f"{count / MIB:8.2f} MiB"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9999 else str(value)


@dataclass(frozen=True, kw_only=True)
class _ShapesOnly:
    """A target head without values, to build a draft of shapes from."""

    embedding_VH: torch.Tensor
    head_VH: torch.Tensor

    def normed(self, last_TH: torch.Tensor, state: NormState) -> torch.Tensor:
        return last_TH

    def logits(self, normed_TH: torch.Tensor, rows_NH: torch.Tensor | None = None) -> torch.Tensor:
        return normed_TH @ (self.head_VH if rows_NH is None else rows_NH).T

    def finished(self, products: torch.Tensor) -> torch.Tensor:
        return products


def make_plan(config: RunConfig, provenance: Mapping[str, str], ranks: Ranks | None = None) -> Plan:
    """Work out a run. Raises ConfigError with every problem found."""
    ranks = ranks or Ranks()
    checked = check(config, ranks)
    config, provenance = checked.config, {**provenance, **checked.sources}
    device, target, weights, algorithm = checked.device, checked.target, checked.weights, checked.algorithm
    data = _data(checked)
    steps = _steps(config, data)
    draft = _shapes(algorithm, target)
    parameters = [p for p in draft.parameters() if p.requires_grad]
    dtype = running_dtype(config.target.dtype, target.dtype, torch.device(device.device_type))
    return Plan(
        run=_run(config, device, ranks.all),
        target={
            "path": str(target.path),
            "architecture": target.architecture,
            "layers": target.num_layers,
            "hidden size": target.hidden_size,
            "vocabulary": target.vocab_size,
            "parameters": sum(math.prod(weights.shape(name)) for name in weights.files),
            "precision": str(dtype).removeprefix("torch."),
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
        memory=estimate(algorithm, draft, target, weights, _load(config, data, dtype, ranks.all)),
        settings=_settings(config, provenance),
        notes=_notes(checked, data, steps, ranks.all),
    )


def _data(checked: Checked) -> dict[str, Any]:
    """Counts: exact where the data has been tokenised before, else of rows, before any is filtered."""
    config, reader = checked.config, checked.reader
    facts: dict[str, Any] = {"train": [str(file) for file in config.data.train]}
    if config.data.validation:
        facts["validation"] = [str(file) for file in config.data.validation]
    reading = DatasetSettings.from_config(config.data)
    entry = cache.entry_path(reading, cache.fingerprint(reader.files, checked.tokenizer, reading, None))
    cached = cache.find(entry, None) if entry.exists() else None
    if cached is not None:
        lengths = cached.offsets.diff()
        return {
            **facts,
            "samples": lengths.numel(),
            "tokens": int(lengths.sum()),
            "longest sample": int(lengths.max()),
            "counted": "exactly, from the cache",
        }
    usable = bad = 0
    for row in reader:
        bad += isinstance(row, BadRow)
        usable += not isinstance(row, BadRow)
    if not usable:
        raise ConfigError([Problem(field="data.train", message=f"none of the {bad} rows can be used")])
    return {**facts, "samples": usable, "bad rows": bad, "counted": "rows, before tokenising and filtering"}


def _steps(config: RunConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    per_epoch = math.ceil(data["samples"] / config.train.batch_size)
    planned = per_epoch * config.train.epochs
    total = min(planned, config.train.max_steps or planned)
    return {
        "per epoch": per_epoch,
        "total": total,
        "warm-up": min(config.train.warmup_steps, total),
        "checkpoints": math.ceil(total / config.train.checkpoint_every),
        "validations": 0 if not config.data.validation else _validations(total, config.eval.every),
        "samples per step": config.train.batch_size,
    }


def _validations(total: int, every: int) -> int:
    return math.ceil(total / every) if every else 1


def _shapes(algorithm: Algorithm, target: TargetSpec) -> torch.nn.Module:
    """The draft without storage."""
    with torch.device("meta"):
        ends = torch.empty(target.vocab_size, target.hidden_size)
        vocabulary = VocabularyMap(ids_N=torch.arange(algorithm.vocabulary_size), target_size=target.vocab_size)
        return algorithm.build_draft(vocabulary, _ShapesOnly(embedding_VH=ends, head_VH=ends))


def _load(config: RunConfig, data: Mapping[str, Any], target_dtype: torch.dtype, ranks: int) -> Load:
    return Load(
        ranks=ranks,
        micro_batch_tokens=row_tokens(config, ranks, data.get("longest sample")),
        compute={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision.compute],
        target_dtype=target_dtype,
        memory=step_memory(config.train),
    )


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
    if config.train.warmup_steps >= steps["total"]:
        notes.append(f"the warm-up of {config.train.warmup_steps} steps is as long as the whole run")
    if not config.data.validation:
        notes.append("no data.validation: no decoding during the run, and no checkpoint is the best one")
    if data.get("bad rows"):
        notes.append(f"{data['bad rows']} rows cannot be used; training reports each with file, line and reason")
    return notes
