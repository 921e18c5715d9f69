"""Drafts of blocks in the field's two published layouts, and back.

plain        `architectures` names the draft, `dflash_config` holds mask token and tapped layers: z-lab's form, which
             SGLang reads and vLLM, too
speculators  `speculators_model_type`: vLLM, which then needs no other argument

Numbering of tapped layers, where ours is l: the plain layout stores l, the speculators layout l + 1. Embedding and
head are the target's and are not stored, but for the head's rows of a pruned vocabulary, which only the speculators
layout can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.geometry import BlockGeometry
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.draft_config import (
    check_layer,
    copy_field,
    layer_config,
    layer_fields,
    layers_listed,
    llama_fields,
    names_listed,
    object_at,
    speculators_fields,
)
from torchspec.core.export.draft_tensors import check_embedding, load_stored, read_vocabulary
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.models.target_head import load_target_head

if TYPE_CHECKING:
    from torchspec.core.algorithms.blocks.algorithm import BlockAlgorithm
    from torchspec.core.algorithms.blocks.body import BlockDraft
    from torchspec.core.interfaces.engine import TargetSpec

LAYOUTS = ("plain", "speculators")
KINDS = {"full": "full_attention", "sliding": "sliding_attention"}
TARGETS_OWN = ("embed_tokens.weight", "lm_head.weight")
VOCABULARY_TENSORS = ("d2t", "t2d")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How files name a draft: its class in the plain layout, its kind in the speculators layout (None: it has none).

    says_anchor   the plain layout has a field for `sample_from_anchor`
    projector     what the plain layout's `projector_type` says, which tells drafts of one class apart
    aliases       other names of the class that are read
    """

    architecture: str
    kind: str | None
    says_anchor: bool = False
    projector: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def layouts(self) -> tuple[str, ...]:
        return LAYOUTS if self.kind is not None else LAYOUTS[:1]

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes such a draft."""
        if is_speculators(config):
            return bool(config["speculators_model_type"] == self.kind)
        named = config.get("architectures")
        special = config.get("dflash_config")
        inside = special.get("projector_type") if isinstance(special, Mapping) else None
        projector = config.get("projector_type") or inside
        known = {self.architecture, *self.aliases}
        return isinstance(named, list) and not known.isdisjoint(named) and projector == self.projector


def layouts(form: Format, geometry: BlockGeometry) -> tuple[str, ...]:
    """Those that can hold such a draft."""
    return tuple(layout for layout in form.layouts if not _problems(layout, form, geometry))


def to_files(algorithm: BlockAlgorithm, state: Mapping[str, Tensor], layout: str) -> DraftFiles:
    """The draft in a published layout. Raises ConfigError where the layout's readers could not serve it."""
    form, geometry, target = algorithm.form, algorithm.geometry, algorithm.target
    if layout not in form.layouts:
        message, remedy = f"no engine reads drafts of {algorithm.name} in it", "export with --format sglang"
        raise ConfigError([Problem(field="layout", value=layout, message=message, choices=form.layouts, remedy=remedy)])
    problems = _problems(layout, form, geometry)
    if problems:
        raise ConfigError(problems)
    dtype = state["fc.weight"].dtype
    layer = _qwen3_fields(geometry, str(dtype).removeprefix("torch."))
    tensors = dict(state)
    if geometry.draft_vocab_size == geometry.vocab_size:
        for name in VOCABULARY_TENSORS:  # of a vocabulary that was not pruned vLLM has no map
            tensors.pop(name)
    if layout == "plain":
        return DraftFiles(config=_plain(algorithm, layer), tensors=tensors)
    if "d2t" in tensors:
        head = load_target_head(
            target.path, dtype=dtype, device=torch.device("cpu"), trust_remote_code=target.trust_remote_code
        )
        ids_N = tensors["d2t"] + torch.arange(geometry.draft_vocab_size)
        tensors["lm_head.weight"] = head.rows(ids_N).contiguous()
    return DraftFiles(config=_speculators(algorithm, layer), tensors=tensors)


def _problems(layout: str, form: Format, geometry: BlockGeometry) -> list[Problem]:
    return (_plain_problems if layout == "plain" else _speculators_problems)(form, geometry)


def _speculators_problems(form: Format, geometry: BlockGeometry) -> list[Problem]:
    """vLLM (seen in 0.32.0) takes what a DFlash config says of sliding layers for all of them, of DSpark's nothing."""
    if form.kind != "dflash" or geometry.sliding_window_non_causal or len(set(geometry.layer_types)) < 2:
        return []
    return [
        Problem(
            field="draft.layer_types",
            value=list(geometry.layer_types),
            message="vLLM would have full layers see the earlier slots of a block alone, too, as sliding ones do",
            remedy="train with draft.sliding_window_non_causal=true or layers of one kind, or export with --format hf",
        )
    ]


def _plain_problems(form: Format, geometry: BlockGeometry) -> list[Problem]:
    problems = []
    if geometry.sample_from_anchor and not form.says_anchor:
        problems.append(
            Problem(
                field="draft.sample_from_anchor",
                value=True,
                message="the plain layout cannot say it, and its readers would take every token from the wrong slot",
                remedy="train without it: the speculators layout can say it, and no engine is known to serve it",
            )
        )
    if geometry.draft_vocab_size != geometry.vocab_size:
        remedy = "train with the whole vocabulary" + ("" if form.kind is None else ", or export with --format vllm")
        problems.append(
            Problem(
                field="draft.vocab_size",
                value=geometry.draft_vocab_size,
                message="the plain layout has no head of its own: it cannot say which tokens the draft knows",
                remedy=remedy,
            )
        )
    return problems


def _qwen3_fields(geometry: BlockGeometry, dtype: str) -> dict[str, Any]:
    layers = len(geometry.layer_types)
    fields = llama_fields(geometry, geometry.vocab_size, dtype, num_layers=layers)
    del fields["mlp_bias"]
    if geometry.sliding_window_non_causal:
        fields["is_causal"] = False  # readers of either layout take sliding layers for causal ones unless they are told
    return fields | {
        "model_type": "qwen3",
        "layer_types": [KINDS[kind] for kind in geometry.layer_types],
        "sliding_window": geometry.sliding_window,
        "use_sliding_window": geometry.sliding_window is not None,
        "max_window_layers": layers,
    }


def _plain(algorithm: BlockAlgorithm, layer: Mapping[str, Any]) -> dict[str, Any]:
    geometry = algorithm.geometry
    special: dict[str, Any] = {"mask_token_id": geometry.mask_token, "target_layer_ids": list(algorithm.taps)}
    if geometry.sliding_window_non_causal:
        special["causal"] = False  # the older name of `is_causal`, which vLLM alone reads
    return {
        "architectures": [algorithm.form.architecture],
        **layer,
        "block_size": geometry.block_size,
        "num_target_layers": algorithm.target.num_layers,
        "dflash_config": special,
        **({"sample_from_anchor": geometry.sample_from_anchor} if algorithm.form.says_anchor else {}),
        **algorithm.extra_fields(),
    }


def _speculators(algorithm: BlockAlgorithm, layer: Mapping[str, Any]) -> dict[str, Any]:
    geometry, kind = algorithm.geometry, algorithm.form.kind
    assert kind is not None
    return {
        "architectures": [algorithm.form.architecture],
        **speculators_fields(kind, algorithm.target, layer, tokens=geometry.block.steps),
        "draft_vocab_size": geometry.draft_vocab_size,
        "target_hidden_size": geometry.target_hidden_size,
        "block_size": geometry.block_size,
        "mask_token_id": geometry.mask_token,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in algorithm.taps],
        "sample_from_anchor": geometry.sample_from_anchor,
        # Where it is false vLLM takes full layers for causal ones, too.
        "sliding_window_non_causal": geometry.sliding_window_non_causal or "sliding" not in geometry.layer_types,
        **algorithm.extra_fields(),
    }


def stated_fields(config: Mapping[str, Any], draft: str) -> dict[str, Any]:
    """Geometry fields (and `taps`) that a config.json of either layout states; `draft` says whose it is.

    Raises ValueError for a field of the wrong type or a kind of layer that such a draft does not have.
    """
    layer = layer_config(config)
    check_layer(layer, draft)
    fields = layer_fields(layer)
    copied: dict[str, Any] = {}
    copy_field(copied, "num_hidden_layers", layer, int)
    fields |= {"num_layers": copied["num_hidden_layers"]} if copied else {}
    kinds = names_listed(layer, "layer_types")
    if kinds:
        unknown = sorted(set(kinds) - set(KINDS.values()))
        if unknown:
            raise ValueError(f"layer_types are {', '.join(KINDS.values())}, got {', '.join(unknown)}")
        fields["layer_types"] = tuple(short for kind in kinds for short, name in KINDS.items() if name == kind)
        if "sliding" in fields["layer_types"]:
            copy_field(fields, "sliding_window", layer, int)
    special = object_at(config, "dflash_config")
    place = config if "block_size" in config else special
    copy_field(fields, "block_size", place, int)
    if is_speculators(config):
        copy_field(fields, "draft_vocab_size", config, int)
        copy_field(fields, "target_hidden_size", config, int)
        copy_field(fields, "sample_from_anchor", config, bool)
        if "sliding" in fields.get("layer_types", ()):
            copy_field(fields, "sliding_window_non_causal", config, bool)
        mask, listed, first = config.get("mask_token_id"), layers_listed(config, "aux_hidden_state_layer_ids"), 1
    else:
        copy_field(fields, "sample_from_anchor", config, bool)
        mask, listed, first = special.get("mask_token_id"), layers_listed(special, "target_layer_ids"), 0
        told = special.get("causal") is False or layer.get("is_causal") is False
        if told and "sliding" in fields.get("layer_types", ()):
            fields["sliding_window_non_causal"] = True
    if mask is not None:
        if type(mask) is not int or mask < 0:
            raise ValueError(f"mask_token_id must be a token, got {mask!r}")
        fields["mask_token"] = mask
    return fields if listed is None else fields | {"taps": tuple(number - first for number in listed)}


def load_draft(algorithm: BlockAlgorithm, files: DraftFiles) -> BlockDraft:
    """The float32 draft that these files hold. Raises CheckpointError."""
    geometry, target = algorithm.geometry, algorithm.target
    vocabulary = read_vocabulary(files.tensors, geometry.draft_vocab_size, geometry.vocab_size)
    draft = algorithm.new_draft(vocabulary)
    state = dict(files.tensors) | {"d2t": vocabulary.d2t_N, "t2d": vocabulary.t2d_V}
    if "embed_tokens.weight" in state:
        check_embedding(state.pop("embed_tokens.weight"), target)
    if "lm_head.weight" in state:
        _check_head(state.pop("lm_head.weight"), vocabulary.ids_N, target)
    load_stored(draft, state)
    return draft


def _check_head(stored_NH: Tensor, ids_N: Tensor, target: TargetSpec) -> None:
    """A head that was trained would be lost silently: these drafts use the target's."""
    trusted = target.trust_remote_code
    head = load_target_head(target.path, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trusted)
    wanted_NH = head.rows(ids_N)
    if stored_NH.shape != wanted_NH.shape or not torch.allclose(stored_NH.float(), wanted_NH, rtol=0, atol=1e-2):
        raise CheckpointError(
            f"the draft's lm_head {list(stored_NH.shape)} is not the target's at its tokens: it was made for another "
            f"target than {target.path}, or trained, which is not done here"
        )
