"""`torchspec export`: from a checkpoint to what an engine serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from torchspec.cli.console import announce
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.core.config.schema import Section
from torchspec.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.export.layout import ExportContext
    from torchspec.core.interfaces.algorithm import Algorithm

log = logging.getLogger(__name__)


class ExportOptions(Section):
    checkpoint: Path = Field(
        description="a run directory (its best checkpoint, else its newest), one checkpoint of it, or an exported draft"
    )
    format: Literal["hf", "sglang", "vllm"] = Field(
        description="hf and sglang: the algorithm's plain layout, mostly read by vLLM, too; vllm: the speculators one"
    )
    output: Path = Field(description="the directory to write; an earlier draft there is replaced")
    target: Path | None = Field(
        None, description="directory of the target; default: where it was in training. An exported draft needs it"
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the target's directory")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of the stored tensors")


def parser() -> Parser:
    made = Parser(
        "export",
        "Write a checkpoint as a draft that an engine loads, and check it: the written files are read back by an\n"
        "independent reader, which must predict what the trained draft predicts.",
    )
    add_options(made, ExportOptions, all_flags(ExportOptions))
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), ExportOptions, words)
    announce(f"torchspec export: reading {options.checkpoint}")

    import torch

    from torchspec.core.config import environment
    from torchspec.core.export.layout import FORMATS, check_replaceable, write_draft

    problems = environment.output_problems("--output", options.output.parent)
    if problems:
        raise ConfigError(problems)
    check_replaceable(options.output)
    algorithm, draft, context = _read(options)
    dtype: torch.dtype = getattr(torch, options.dtype)
    outcome = write_draft(algorithm, draft, FORMATS[options.format], options.output, context, dtype)
    features = "recorded features of the training" if outcome.recorded else "random features"
    print(
        f"{options.output}: checked on {features}, {outcome.drafted} drafted tokens; their distributions are at most "
        f"{outcome.total_variation:.1e} apart (total variation, limit {outcome.limit:.0e})"
    )
    return 0


def _read(options: ExportOptions) -> tuple[Algorithm, nn.Module, ExportContext]:
    """The draft in memory, and what the check of the export needs."""
    from torchspec.core import registry
    from torchspec.core.export.layout import CONFIG, ExportContext
    from torchspec.core.pipeline.rebuild import rebuild, recorded_probe

    if (options.checkpoint / CONFIG).is_file():
        return _read_exported(options)
    checkpoint = _whole_checkpoint(options.checkpoint)
    rebuilt = rebuild(checkpoint, target=options.target, trust_remote_code=options.trust_remote_code)
    _check_target(checkpoint, rebuilt.target.path)
    return (
        rebuilt.algorithm,
        rebuilt.draft,
        ExportContext(
            head=rebuilt.head, device=registry.load_device("cpu"), probe=recorded_probe(checkpoint.parent.parent)
        ),
    )


def _whole_checkpoint(path: Path) -> Path:
    """Of a run the best checkpoint that is whole, else the newest; one that was named itself as it is.

    Damaged ones are named and passed over as at the end of a training, but keep their names: it may be going on.
    Raises CheckpointError when there is no checkpoint, and the best one's damage when none is whole.
    """
    from torchspec.core.errors import CheckpointError
    from torchspec.core.pipeline.rebuild import find_checkpoint
    from torchspec.core.training.checkpoint_files import directory_of, read_manifest, steps_on_disk, verify

    best = find_checkpoint(path)
    if best == path:
        return path
    scores = {step: _score(directory_of(best.parent, step)) for step in steps_on_disk(best.parent)}
    # The earlier of equals, and the newest of those without a score.
    steps = sorted(scores, key=lambda step: (-scores[step], step if scores[step] > float("-inf") else -step))
    damage: list[CheckpointError] = []
    for step in steps:
        checkpoint = directory_of(best.parent, step)
        try:
            verify(checkpoint, read_manifest(checkpoint).files)
        except CheckpointError as error:
            log.warning("checkpoint %s is damaged and passed over: %s", checkpoint, error)
            damage.append(error)
        else:
            return checkpoint
    raise damage[0]


def _score(checkpoint: Path) -> float:
    """The acceptance length validated at it; lower than any where there is none, or no manifest that says so."""
    from torchspec.core.errors import CheckpointError
    from torchspec.core.training.checkpoint_files import read_manifest

    try:
        score = read_manifest(checkpoint).score
    except CheckpointError:
        score = None
    return float("-inf") if score is None else score


def _check_target(checkpoint: Path, target: Path) -> None:
    """CheckpointError when `target` is not the one the draft was trained on; one of the same shape would pass."""
    from torchspec.core.errors import CheckpointError
    from torchspec.core.models.target_weights import weights_fingerprint
    from torchspec.core.training.checkpoint import DRAFT
    from torchspec.core.training.checkpoint_files import read_json

    facts = read_json(checkpoint / DRAFT)
    if weights_fingerprint(target) != facts["identity"]["target"]["weights"]:
        raise CheckpointError(
            f"{checkpoint} was trained on the target at {facts['target_path']}, and the weights in {target} are "
            "others: give --target with the weight files of the training (saved anew they count as others)"
        )


def _read_exported(options: ExportOptions) -> tuple[Algorithm, nn.Module, ExportContext]:
    import torch

    from torchspec.core import registry
    from torchspec.core.errors import Problem
    from torchspec.core.export.layout import ExportContext, read_draft
    from torchspec.core.models.target_head import load_target_head
    from torchspec.core.models.target_spec import read_target_spec, resolve_target

    if options.target is None:
        message = "required: an exported draft does not say where its target is"
        raise ConfigError([Problem(field="--target", message=message, remedy="give --target")])
    target = resolve_target(options.target)
    trusted = options.trust_remote_code
    algorithm, draft = read_draft(options.checkpoint, read_target_spec(target, trusted))
    head = load_target_head(target, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trusted)
    return algorithm, draft.float(), ExportContext(head=head, device=registry.load_device("cpu"))
