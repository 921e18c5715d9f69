"""DSpark drafts in the layouts of `blocks.files`, and back.

plain        `architectures` is DeepSpec's, whose fields stand at the top level: SGLang computes every head, vLLM
             vanilla ones. Fields of a draft of blocks stand in `dflash_config`, too, where other readers look
speculators  vLLM, vanilla heads

In the plain layout the anchor's slot predicts: that is what its readers agree on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from torchspec.core.algorithms.blocks import files
from torchspec.core.algorithms.blocks.files import Format
from torchspec.core.algorithms.dspark.geometry import DSparkGeometry
from torchspec.core.algorithms.dspark.options import HeadType
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.draft_config import copy_field
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.algorithm import DraftFiles

if TYPE_CHECKING:
    from torchspec.core.algorithms.dspark.algorithm import DSpark

FORM = Format(architecture="Qwen3DSparkModel", kind="dspark", says_anchor=True)
HEAD_TYPES: tuple[str, ...] = get_args(HeadType)
SPECULATORS_ARCHITECTURE = "DSparkDraftModel"
PROJECTOR = "dspark"
BODY_FIELDS = ("mask_token_id", "target_layer_ids")
HEAD_FIELDS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def layouts(geometry: DSparkGeometry) -> tuple[str, ...]:
    """Those that can hold such a draft."""
    return tuple(layout for layout in files.layouts(FORM, geometry) if not _refused(layout, geometry))


def to_files(algorithm: DSpark, state: Mapping[str, Tensor], layout: str) -> DraftFiles:
    """The draft in a published layout. Raises ConfigError where the layout's readers could not serve it."""
    geometry = algorithm.geometry
    problems = _refused(layout, geometry)
    if problems:
        raise ConfigError(problems)
    made = files.to_files(algorithm, state, layout)
    config, notes = dict(made.config), []
    if layout == "plain":
        config |= {name: config["dflash_config"][name] for name in BODY_FIELDS}
        if geometry.markov_head_type != "vanilla":
            notes.append(
                f"vLLM computes vanilla Markov heads alone: serve this draft, whose head is "
                f"{geometry.markov_head_type}, with SGLang"
            )
    else:
        config["architectures"] = [SPECULATORS_ARCHITECTURE]
        if geometry.sample_from_anchor:
            instead = (
                "serve the plain layout: torchspec export --format hf"
                if "plain" in layouts(geometry)
                else "serve no draft of a pruned vocabulary: train without draft.vocab_size for them"
            )
            notes.append(
                "versions of vLLM that do not read sample_from_anchor from a speculators config (before its "
                f"pull request 48639) take every token from the slot behind its own; they {instead}"
            )
    if algorithm.options.min_confidence > 0:
        config["min_confidence"] = algorithm.options.min_confidence
        notes.append("min_confidence is read by torchspec eval; engines schedule by arguments of their own")
    return DraftFiles(config=config, tensors=made.tensors, notes=(*made.notes, *notes))


def head_fields(geometry: DSparkGeometry) -> dict[str, Any]:
    """What both layouts say of the heads."""
    return {name: getattr(geometry, name) for name in HEAD_FIELDS}


def as_published(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plain config of others with the heads' fields at its top and DeepSpec's name for the draft: SpecForge and
    TorchSpec write them into `dflash_config`, and call the head that is `vanilla` here `classical`, too. Raises
    ValueError where both places are filled and differ; any other config is returned as it is."""
    named = config.get("architectures")
    special = config.get("dflash_config")
    inside = special if isinstance(special, Mapping) else {}
    ours = isinstance(named, list) and not {FORM.architecture, SPECULATORS_ARCHITECTURE}.isdisjoint(named)
    if is_speculators(config) or not (ours or inside.get("projector_type") == PROJECTOR):
        return config
    made = {**config, "architectures": [FORM.architecture]}
    for name in HEAD_FIELDS:
        within = inside.get(name)
        if within is not None and made.get(name) not in (None, within):
            raise ValueError(f"{name} is {made[name]!r}, and {within!r} in dflash_config")
        made[name] = made.get(name) if within is None else within
    if made["markov_head_type"] == "classical":
        made["markov_head_type"] = HEAD_TYPES[0]
    made = {name: value for name, value in made.items() if name not in HEAD_FIELDS or value is not None}
    if inside:
        dropped = (*HEAD_FIELDS, "projector_type", "confidence_head_alpha")
        made["dflash_config"] = {name: value for name, value in inside.items() if name not in dropped}
    return made


def as_blocks(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with its body's fields where `blocks.files` looks for them."""
    if is_speculators(config) or "dflash_config" in config:
        return config
    return {**config, "dflash_config": {name: config[name] for name in BODY_FIELDS if name in config}}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A draft's config.json of either layout that says of the heads and the anchor's slot what its readers take where
    it is silent. Raises ValueError."""
    if "markov_rank" not in config:
        raise ValueError("markov_rank is missing: a DSpark draft has a Markov head")
    bonus: dict[str, Any] = {}
    copy_field(bonus, "dspark_bonus_anchor", config, bool)
    silent = {
        "sample_from_anchor": not bonus.get("dspark_bonus_anchor", False),
        "markov_head_type": "vanilla",
        "enable_confidence_head": False,
        "confidence_head_with_markov": False,
    }
    filled = {**config, **{name: value for name, value in silent.items() if config.get(name) is None}}
    stated_heads(filled)
    return filled


def stated_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of either layout says of the heads and the anchor's slot. Raises ValueError."""
    fields: dict[str, Any] = {}
    copy_field(fields, "markov_rank", config, int)
    copy_field(fields, "markov_head_type", config, str)
    for name in ("enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor"):
        copy_field(fields, name, config, bool)
    if fields.get("markov_head_type", HEAD_TYPES[0]) not in HEAD_TYPES:
        raise ValueError(f"markov_head_type is one of {', '.join(HEAD_TYPES)}, got {fields['markov_head_type']!r}")
    if fields.get("enable_confidence_head") is False:
        fields.pop("confidence_head_with_markov", None)  # it says nothing of a head that is not there
    return fields


def stated_options(config: Mapping[str, Any], *, enabled: bool) -> dict[str, Any]:
    """Options that a config.json of either layout states and the geometry does not hold. Raises CheckpointError."""
    value = config.get("min_confidence", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 or (value and not enabled):
        raise CheckpointError(
            f"config.json of the draft: min_confidence must be a number from 0 up to 1, and 0 without a confidence "
            f"head, got {value!r}"
        )
    return {"min_confidence": float(value), **({} if enabled else {"confidence_weight": 0.0})}


def _refused(layout: str, geometry: DSparkGeometry) -> list[Problem]:
    """What the heads have against a layout, beside what `blocks.files` has."""
    if layout == "plain" and not geometry.sample_from_anchor:
        return [
            Problem(
                field="draft.sample_from_anchor",
                value=False,
                message="readers of the plain layout take the first token from the anchor's slot",
                remedy="train with it, or, with a vanilla head, export with --format vllm",
            )
        ]
    if layout == "speculators" and geometry.markov_head_type != "vanilla":
        return [
            Problem(
                field="draft.markov_head_type",
                value=geometry.markov_head_type,
                message="vLLM, which alone reads the speculators layout, computes vanilla heads alone",
                remedy="train a vanilla one, or export with --format sglang",
            )
        ]
    return []
