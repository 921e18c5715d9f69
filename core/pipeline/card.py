"""What a run's files say for the model card of its draft."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from torchspec.core import registry
from torchspec.core.config.schema import run_schema, stated
from torchspec.core.config.secrets import blanked
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.card import CARD, CardFacts, Measured, hub_id, stated_license, with_results
from torchspec.core.export.layout import CONFIG
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.pipeline import run_dir
from torchspec.core.report.record import read_run
from torchspec.core.training.checkpoint import DRAFT, TRAINER
from torchspec.core.training.checkpoint_files import read_json, read_manifest

KEPT = ("seed", "algorithm", "target", "data", "train", "precision", "on_policy", "draft")
"""Sections of a configuration that shape a draft; of the others nothing is told."""
LEFT_OUT = {
    "target": ("path", "chat_template", "tensor_parallel", "shard_logits", "trust_remote_code"),
    "data": ("train", "validation", "cache_dir"),
    "train": (
        "loss_memory_mb", "offload", "memory_gb", "log_every", "trackers", "project", "profile_step", "keep_last",
        "checkpoint_every", "resume",
    ),
}  # fmt: skip
"""Of those sections: places, and what shapes a run and not its draft."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What only the user knows of the hub: the target there, the draft's license, where the draft will be."""

    base_model: str | None = None
    license: str | None = None
    repository: str | None = None


def exported_facts(
    algorithm: Algorithm, target: TargetSpec, naming: Naming, results: Sequence[Measured] = ()
) -> CardFacts:
    """Of a draft of which only the files are known."""
    known = hub_id(target.path)
    base = naming.base_model or (known and known[0])
    found = naming.license or stated_license(target.path)
    how = "the target's, as its own card gives it; whether it is the draft's, too, is yours to say"
    return CardFacts(
        algorithm=algorithm.name,
        target_name=base or target.path.resolve().name,
        target_shape=f"{target.architecture}, {target.num_layers} layers, hidden size {target.hidden_size}",
        torchspec=version("torchspec"),
        base_model=base,
        revision=known[1] if known is not None and known[0] == base else None,
        license=found,
        license_from=how if found and not naming.license else "",
        repository=naming.repository,
        taps=algorithm.taps,
        results=results,
    )


def converted_facts(algorithm: Algorithm, target: TargetSpec, source: Path) -> CardFacts:
    """Of a published draft in another layout; what is known of it beyond its files is in its own card."""
    facts = exported_facts(algorithm, target, Naming())
    found = hub_id(source)
    link = found and f"[{found[0]}](https://huggingface.co/{found[0]}), revision `{found[1]}`"
    told = (
        f"`torchspec convert` put the draft of {link or f'the directory `{source.resolve().name}`'} into this layout, "
        "tensor by tensor the same, and trained nothing. Who trained it, on which data and with which settings is not "
        f"known here; {'its own card may say' if (source / CARD).is_file() else 'no card was beside it'}."
    )
    theirs = stated_license(source)
    if theirs is not None:
        facts = replace(facts, license=theirs, license_from="that of the converted draft, as its own card gives it")
    return replace(facts, origin=told)


def brought_facts(
    algorithm: Algorithm,
    target: TargetSpec,
    counts: Mapping[str, object],
    updates: int,
    settings: Mapping[str, Any],
    machine: Mapping[str, object],
) -> CardFacts:
    """Of a draft that somebody else's loop has trained, on samples that nobody has written down.

    updates: how often the target's weights became others meanwhile; then no model on the hub is its target.
    """
    there = target.path.is_absolute() and target.path.is_dir()
    unnamed = replace(target, path=Path("a model that was given in memory"))
    facts = exported_facts(algorithm, target if there else unnamed, Naming())
    told = "By an `OnlineDraftTrainer`, in a program that brought the texts; which they were is not known here."
    if updates:
        facts = replace(facts, base_model=None, revision=None)
        told += (
            f" The target's weights were replaced {updates} times meanwhile: the draft is for those of the last time, "
            "which are not known here, and the target above is what it began with."
        )
    given = {name: _placeless(each) if isinstance(each, Mapping) else each for name, each in settings.items()}
    return replace(facts, origin=told, counts=counts, recipe=blanked(given), machine=machine)


def checkpoint_facts(
    checkpoint: Path, algorithm: Algorithm, target: TargetSpec, naming: Naming, results: Sequence[Measured] = ()
) -> CardFacts:
    """Of a checkpoint's draft, with what its run directory tells of data and machine."""
    saved, progress = read_json(checkpoint / DRAFT), read_json(checkpoint / TRAINER)
    config = saved["config"]
    run = checkpoint.parent.parent
    step = read_manifest(checkpoint).step
    validated = [_validation(row) for row in _rows(run) if row.get("step") == step and _is_validation(row)]
    return replace(
        exported_facts(algorithm, target, naming, [*validated, *results]),
        draft_length=int(config["eval"]["draft_length"]),
        longest=int(config["data"]["max_length"]),
        counts=_counts(config, progress, _known(run / run_dir.DATA)),
        recipe=recipe(config),
        machine=_machine(_known(run / run_dir.ENVIRONMENT)),
    )


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make such a draft again, as far as they are not the defaults; no place is among them.

    `config`: a resolved configuration, as JSON.
    """
    schema = run_schema(registry.algorithms().spec(config["algorithm"]).options)
    found: dict[str, Any] = {}
    for name in KEPT:
        value, info = config.get(name), schema.model_fields[name]
        model: object = info.annotation
        if isinstance(value, Mapping) and isinstance(model, type) and issubclass(model, BaseModel):
            value = _changed(model, {key: each for key, each in value.items() if key not in LEFT_OUT.get(name, ())})
            if value and not (name == "on_policy" and not value.get("enabled")):
                found[name] = value
        elif value != info.get_default() or name in ("algorithm", "seed"):
            found[name] = value
    return blanked(found)


def _changed(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not the default; of a file its name."""
    required = {name for name, info in model.model_fields.items() if info.is_required()}
    given = values if required else stated(model, values)
    return _placeless(
        {name: value for name, value in given.items() if name in required or value != _default(model, name)}
    )


def _placeless(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a file its name."""
    return {
        name: Path(value).name if isinstance(value, str) and "/" in value else value for name, value in values.items()
    }


def _default(model: type[BaseModel], name: str) -> Any:
    info = model.model_fields.get(name)
    value = None if info is None else info.get_default(call_default_factory=True, validated_data={})
    return list(value) if isinstance(value, tuple) else value


def _counts(config: Mapping[str, Any], progress: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, object]:
    counts: dict[str, object] = {}
    if data:
        counts["files"] = len(data.get("files", ()))
        counts["conversations read"] = data["read"]
        counts["of them used"] = data["kept"]
        counts["filtered (too few supervised tokens)"] = data["filtered"]
        counts["unusable"] = data["bad_count"]
        counts["cut to the longest length"] = data["truncated"]
        counts["tokens of one pass"] = data["tokens"]
        counts["of them supervised"] = data["supervised_tokens"]
        counts["of them in the draft's vocabulary"] = f"{data['vocabulary_coverage']:.2%}"
    counts["steps"] = progress["step"]
    counts["samples trained on, repeats counted"] = progress["samples"]
    counts["tokens trained on"] = progress["tokens"]
    if config["on_policy"]["enabled"]:
        counts["answers"] = "written by the target while it was trained"
    return counts


def _machine(environment: Mapping[str, Any]) -> dict[str, object]:
    names = {"device_name": "device", "ranks": "ranks", "torch": "torch", "transformers": "transformers"}
    return {label: environment[name] for name, label in names.items() if environment.get(name)}


def _known(path: Path) -> dict[str, Any]:
    """A file of a run directory; a card is written without one that is missing or damaged."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def _rows(run: Path) -> list[dict[str, Any]]:
    if not (run / run_dir.METRICS).is_file():
        return []
    record = read_run(run)
    return [*record.validation, *record.served]


def _is_validation(row: Mapping[str, Any]) -> bool:
    return {"acceptance_length", "draft_length"} <= row.keys()


def _validation(row: Mapping[str, Any]) -> Measured:
    return Measured.of("validation prompts of the training", row)


def read_results(files: Sequence[Path]) -> list[Measured]:
    """Of eval.json files, each called by its name. ConfigError about `--results` for what is none."""
    found, problems = [], []
    for file in files:
        try:
            found.append(Measured.of(file.stem, json.loads(file.read_text(encoding="utf-8"))))
        except OSError as error:
            problems.append(Problem(field="--results", value=str(file), message=f"cannot be read: {error.strerror}"))
        except (ValueError, KeyError, TypeError, AttributeError):
            message = "no result of `torchspec eval --output`"
            problems.append(Problem(field="--results", value=str(file), message=message))
    if problems:
        raise ConfigError(problems)
    return found


def put_result(draft: Path, what: str, figures: Mapping[str, Any]) -> None:
    """The results of a draft's card become this one, unless somebody has edited the card."""
    card = draft / CARD
    if not ((draft / CONFIG).is_file() and card.is_file()):
        return
    changed = with_results(card.read_text(encoding="utf-8"), [Measured.of(what, figures)])
    aside = card.with_name(f".{CARD}.new")
    aside.write_text(changed, encoding="utf-8")
    aside.replace(card)
