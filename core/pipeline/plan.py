"""`train --dry-run`: everything a run would do and need, checked and explained, without loading weights or training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchspec.core import registry
from torchspec.core import settings as variables
from torchspec.core.config import environment
from torchspec.core.config.fields import settings as setting_paths
from torchspec.core.config.schema import RunConfig
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings
from torchspec.core.data.rows import BadRow, RowReader
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.errors import ConfigError, Problem, TorchspecError
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import DeviceSpec
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import NormState
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_spec import read_target_spec, resolve_target, running_dtype
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.assembly import create_algorithm, initial_path
from torchspec.core.pipeline.device_fit import backend_problems, device_problems
from torchspec.core.pipeline.plan_memory import Load, Part, estimate
from torchspec.core.training.checkpoint_files import MANIFEST, steps_on_disk

Found = TypeVar("Found")
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


class _Problems(list[Problem]):
    """Collects what is wrong, so that everything is reported at once."""

    def attempt(self, path: str, work: Callable[[], Found]) -> Found | None:
        """The result, or None with the failure noted under the setting it comes from."""
        try:
            return work()
        except ConfigError as error:
            self.extend(error.problems)
        except TorchspecError as error:
            self.append(Problem(field=path, message=str(error)))
        return None


@dataclass(frozen=True, kw_only=True)
class _ShapesOnly:
    """A target head without values, to build a draft of shapes from."""

    embedding_VH: torch.Tensor
    head_VH: torch.Tensor

    def normed(self, last_TH: torch.Tensor, state: NormState) -> torch.Tensor:
        return last_TH

    def logits(self, normed_TH: torch.Tensor, rows_NH: torch.Tensor | None = None) -> torch.Tensor:
        return normed_TH @ (self.head_VH if rows_NH is None else rows_NH).T


def make_plan(config: RunConfig, provenance: Mapping[str, str], *, ranks: int = 1) -> Plan:
    """Work out a run of `ranks` processes. Raises ConfigError with every problem found."""
    problems = _Problems(environment.problems(config.model_dump()))
    device = problems.attempt("device", lambda: _device(config))
    _check_adapters(config, device, ranks, problems)
    _check_output(config, problems)
    path = problems.attempt("target.path", lambda: resolve_target(config.target.path))
    target = weights = algorithm = None
    if path is not None:
        target = problems.attempt("target.path", lambda: read_target_spec(path, config.target.trust_remote_code))
        weights = problems.attempt("target.path", lambda: TargetWeights.open(path))
    if target is not None:
        spec = target
        algorithm = problems.attempt("draft", lambda: create_algorithm(config, spec))
        _check_initial(config, problems)
    data = _data(config, path, problems)
    known = list(dict.fromkeys(problems))
    if known:
        raise ConfigError(known)
    assert device is not None
    assert target is not None
    assert weights is not None
    assert algorithm is not None
    steps = _steps(config, data)
    draft = _shapes(algorithm, target)
    parameters = [p for p in draft.parameters() if p.requires_grad]
    dtype = running_dtype(config.target.dtype, target.dtype, torch.device(device.device_type))
    return Plan(
        run=_run(config, device, ranks),
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
        memory=estimate(algorithm, draft, target, weights, _load(config, data, dtype, ranks)),
        settings=_settings(config, provenance),
        notes=_notes(config, data, steps, ranks),
    )


def _device(config: RunConfig) -> DeviceSpec:
    name, _ = registry.choose_device(config.device, variables.default_device())
    return registry.devices().spec(name)


def _check_adapters(config: RunConfig, device: DeviceSpec | None, ranks: int, problems: _Problems) -> None:
    if device is not None:
        problems += device_problems(config, device, ranks)
    backend = problems.attempt("backend", lambda: registry.backends().spec(config.backend))
    if backend is not None:
        problems += backend_problems(config, backend)


def _check_output(config: RunConfig, problems: _Problems) -> None:
    problem = run_dir.refusal(config)
    if problem is not None:
        problems.append(Problem(field="output", value=str(config.output), message=problem))


def _check_initial(config: RunConfig, problems: _Problems) -> None:
    path = initial_path(config)
    if path is None:
        return
    known = ("config.json", MANIFEST, "checkpoints")
    if not any((path / name).exists() for name in known) and not steps_on_disk(path):
        problems.append(
            Problem(
                field="draft.init_from",
                value=str(path),
                message="is neither an exported draft nor a checkpoint nor a run directory",
            )
        )


def _data(config: RunConfig, target: Path | None, problems: _Problems) -> dict[str, Any]:
    """Counts: exact where the data has been tokenised before, else of rows, before any is filtered."""
    facts: dict[str, Any] = {"train": [str(file) for file in config.data.train]}
    reader = problems.attempt("data.train", lambda: RowReader(config.data.train))
    if config.data.validation:
        facts["validation"] = [str(file) for file in config.data.validation]
        problems.attempt("data.validation", lambda: RowReader(config.data.validation))
    if target is None:
        return facts
    tokenizer = problems.attempt(
        "target.path",
        lambda: load_tokenizer(
            target, chat_template=config.target.chat_template, trust_remote_code=config.target.trust_remote_code
        ),
    )
    if reader is None or tokenizer is None:
        return facts
    reading = DatasetSettings.from_config(config.data)
    entry = cache.entry_path(reading, cache.fingerprint(reader.files, tokenizer, reading, None))
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
        problems.append(Problem(field="data.train", message=f"none of the {bad} rows can be used"))
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
    size = min(config.train.micro_batch_size, math.ceil(config.train.batch_size / ranks))
    return Load(
        ranks=ranks,
        micro_batch_tokens=size * data.get("longest sample", config.data.max_length),
        compute={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision.compute],
        target_dtype=target_dtype,
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
    tree = config.model_dump(mode="json")
    rows = []
    for path in setting_paths(type(config)):
        value: Any = tree
        for key in path.split("."):
            value = value[key] if isinstance(value, dict) else None
        rows.append({"path": path, "value": value, "source": provenance.get(path, "default")})
    return rows


def _notes(config: RunConfig, data: Mapping[str, Any], steps: Mapping[str, Any], ranks: int) -> list[str]:
    notes = []
    if ranks > config.train.batch_size:
        notes.append(f"{ranks} ranks share batches of {config.train.batch_size} samples: some have nothing to do")
    if config.train.warmup_steps >= steps["total"]:
        notes.append(f"the warm-up of {config.train.warmup_steps} steps is as long as the whole run")
    if not config.data.validation:
        notes.append("no data.validation: no decoding during the run, and no checkpoint is the best one")
    if data.get("bad rows"):
        notes.append(f"{data['bad rows']} rows cannot be used; training reports each with file, line and reason")
    return notes
