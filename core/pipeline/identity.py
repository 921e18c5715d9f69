"""draft.json: what a checkpoint belongs to. A resume compares its `identity`, an export rebuilds the draft from it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from torchspec.core.config.schema import RunConfig
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_weights import weights_fingerprint
from torchspec.core.pipeline.run_dir import versions


def draft_facts(
    config: RunConfig, algorithm: Algorithm, target: TargetSpec, vocabulary: VocabularyMap, ingredients: dict[str, Any]
) -> dict[str, Any]:
    """JSON. `identity` is everything that a resumed run must share; the rest is for people and for rebuilding.

    `ingredients` of the data are stored as well, so that a difference of their fingerprint can be explained.
    """
    return {
        "identity": {
            **_known_identity(config, algorithm, target),
            "vocabulary": vocabulary_facts(vocabulary),
            "data": {"fingerprint": cache.digest(ingredients)},
        },
        "data": _data_facts(ingredients),
        "option_files": _option_files(algorithm.options),
        "target_path": str(target.path.resolve()),
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def known_facts(
    config: RunConfig,
    algorithm: Algorithm,
    target: TargetSpec,
    tokenizer: PreTrainedTokenizerBase,
    saved: dict[str, Any],
) -> dict[str, Any]:
    """`draft_facts` before any data is read: what is not known yet is taken from those of a checkpoint."""
    known = _known_identity(config, algorithm, target)
    facts: dict[str, Any] = {"identity": {**(saved.get("identity") or {}), **known}}
    if "data" in saved:
        treatment = cache.treatment(tokenizer, DatasetSettings.of_training(config))
        facts["data"] = {**saved["data"], **_plain(treatment), "files": [file.name for file in config.data.train]}
    return facts


def _known_identity(config: RunConfig, algorithm: Algorithm, target: TargetSpec) -> dict[str, Any]:
    circumstances = ("path", "trust_remote_code")  # of this run; no facts about the target
    target_facts = {name: _plain(value) for name, value in asdict(target).items() if name not in circumstances}
    return {
        "algorithm": algorithm.name,
        "draft": options_facts(algorithm.options),
        "taps": list(algorithm.taps),
        "target": {**target_facts, "weights": weights_fingerprint(target.path)},
        "order": {
            "seed": config.seed,
            "batch_size": config.train.batch_size,
            "bucket_size": config.data.bucket_size,
        },
    }


def _data_facts(ingredients: dict[str, Any]) -> dict[str, Any]:
    """The ingredients in a form whose differences read well: the digest of each file under its number and name."""
    files = ingredients["files"]
    contents = {f"{number} ({name})": digest for number, (name, digest) in enumerate(files, start=1)}
    return {**_plain(ingredients), "files": [name for name, _ in files], "contents": contents}


def options_facts(options: BaseModel) -> dict[str, Any]:
    """The draft section; a file it names is known by its contents, not by its place."""
    values = options.model_dump(mode="json")
    for name, path in _named_files(options).items():
        values[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return values


def _named_files(options: BaseModel) -> dict[str, Path]:
    named = {name: getattr(options, name) for name in type(options).model_fields}
    return {name: value for name, value in named.items() if isinstance(value, Path) and value.is_file()}


def _option_files(options: BaseModel) -> dict[str, str]:
    """Text of the (small, textual) files that options name, so that a checkpoint stands alone."""
    texts = {}
    for name, path in _named_files(options).items():
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            message = f"{path} is not a text file"
            raise ConfigError([Problem(field=f"draft.{name}", value=str(path), message=message)]) from error
    return texts


def vocabulary_facts(vocabulary: VocabularyMap) -> dict[str, Any]:
    ids_N = vocabulary.ids_N.cpu().contiguous()
    digest = hashlib.sha256(ids_N.numpy().tobytes()).hexdigest()
    return {"size": vocabulary.size, "target_size": vocabulary.target_size, "sha256": digest}


def _plain(value: Any) -> Any:
    """As JSON will hold it, so that a fresh value equals a stored one."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
