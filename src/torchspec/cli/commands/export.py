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
from torchspec.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.export.card import CardFacts
    from torchspec.core.export.layout import ExportContext
    from torchspec.core.interfaces.algorithm import Algorithm
    from torchspec.core.pipeline.card import Naming

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
    base_model: str | None = Field(
        None, description="OWNER/NAME of the target on the Hugging Face hub, for the model card and for engines"
    )
    license: str | None = Field(
        None, description="license of the draft, for its model card; default: what the target's card says"
    )
    results: list[Path] = Field([], description="eval.json files whose figures the model card is to show")
    push_to_hub: str | None = Field(
        None, description="upload the draft to OWNER/NAME on the Hugging Face hub; a new repository is made private"
    )
    public: bool = Field(False, description="with --push-to-hub: everybody may see it")


def parser() -> Parser:
    made = Parser(
        "export",
        "Write a checkpoint as a draft that an engine loads, and check it: the written files are read back by an\n"
        "independent reader, which must predict what the trained draft predicts. A model card stands beside them.",
    )
    add_options(made, ExportOptions, all_flags(ExportOptions))
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), ExportOptions, words)
    announce(f"torchspec export: reading {options.checkpoint}")

    import torch

    from torchspec.core.config import environment
    from torchspec.core.export.layout import FORMATS, check_replaceable, write_draft

    problems = environment.output_problems("--output", options.output.parent) + _hub_problems(options)
    if problems:
        raise ConfigError(problems)
    check_replaceable(options.output)
    algorithm, draft, context = _read(options)
    assert context.card is not None
    _check_pushable(options, context.card)
    dtype: torch.dtype = getattr(torch, options.dtype)
    outcome = write_draft(algorithm, draft, FORMATS[options.format], options.output, context, dtype)
    features = "recorded features of the training" if outcome.recorded else "random features"
    print(
        f"{options.output}: checked on {features}, {outcome.drafted} drafted tokens; their distributions are at most "
        f"{outcome.total_variation:.1e} apart (total variation, limit {outcome.limit:.0e})"
    )
    if options.push_to_hub is not None:
        from torchspec.core.export.hub import push

        announce(f"uploading to {options.push_to_hub}")
        said = f"Draft of {context.card.target_name} ({algorithm.name})"
        print(push(options.output, options.push_to_hub, public=options.public, message=said))
    return 0


def _hub_problems(options: ExportOptions) -> list[Problem]:
    """Everything that would keep the draft from the hub, or the card from being right, as far as it shows by now."""
    found: list[Problem] = []
    if options.push_to_hub is None:
        if options.public:
            remedy = "give --push-to-hub too, or leave it out"
            found.append(Problem(field="--public", message="is for --push-to-hub", remedy=remedy))
    else:
        from torchspec.core.export.hub import hub_problems

        found += hub_problems("--push-to-hub", options.push_to_hub)
    from torchspec.core.export.card import HUB_ID
    from torchspec.core.pipeline.card import read_results

    if options.base_model is not None and not HUB_ID.fullmatch(options.base_model):
        found.append(Problem(field="--base-model", value=options.base_model, message="not OWNER/NAME of a model"))
    try:
        read_results(options.results)
    except ConfigError as error:
        found += error.problems
    return found


def _check_pushable(options: ExportOptions, card: CardFacts) -> None:
    if options.push_to_hub is not None and card.base_model is None:
        message = "what the target is called on the hub is not known: it was read from a directory of this machine"
        raise ConfigError([Problem(field="--push-to-hub", message=message, remedy="give --base-model OWNER/NAME")])


def _read(options: ExportOptions) -> tuple[Algorithm, nn.Module, ExportContext]:
    """The draft in memory, and what the check of the export needs."""
    from torchspec.core import registry
    from torchspec.core.export.layout import CONFIG, ExportContext
    from torchspec.core.pipeline.card import checkpoint_facts, read_results
    from torchspec.core.pipeline.rebuild import rebuild, recorded_probe

    if (options.checkpoint / CONFIG).is_file():
        return _read_exported(options)
    checkpoint = _whole_checkpoint(options.checkpoint)
    rebuilt = rebuild(checkpoint, target=options.target, trust_remote_code=options.trust_remote_code)
    _check_target(checkpoint, rebuilt.target.path)
    results = read_results(options.results)
    context = ExportContext(
        head=rebuilt.head,
        device=registry.load_device("cpu"),
        probe=recorded_probe(checkpoint.parent.parent),
        card=checkpoint_facts(checkpoint, rebuilt.algorithm, rebuilt.target, _naming(options), results),
    )
    return rebuilt.algorithm, rebuilt.draft, context


def _naming(options: ExportOptions) -> Naming:
    from torchspec.core.pipeline.card import Naming

    return Naming(base_model=options.base_model, license=options.license, repository=options.push_to_hub)


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
    from torchspec.core.export.layout import ExportContext, read_draft
    from torchspec.core.models.target_head import load_target_head
    from torchspec.core.models.target_spec import read_target_spec, resolve_target
    from torchspec.core.pipeline.card import exported_facts, read_results

    if options.target is None:
        message = "required: an exported draft does not say where its target is"
        raise ConfigError([Problem(field="--target", message=message, remedy="give --target")])
    target = resolve_target(options.target)
    trusted = options.trust_remote_code
    spec = read_target_spec(target, trusted)
    algorithm, draft = read_draft(options.checkpoint, spec)
    head = load_target_head(target, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trusted)
    card = exported_facts(algorithm, spec, _naming(options), read_results(options.results))
    return algorithm, draft.float(), ExportContext(head=head, device=registry.load_device("cpu"), card=card)
