"""Drafts of blocks as others publish them, put into the layouts of `blocks.files`.

z-lab, ModelOpt (`export/plugins/hf_spec_export.py`)               DFlashDraftModel with `dflash_config`
SpecForge (`modeling/draft/dflash.py`, `domino.py`, `dspark.py`)   the same; heads' fields in `dflash_config`, in old
                                                                   ones heads under `logit_head`
TorchSpec (`models/draft/dflash.py`, `keymap.py`)                  `context_proj`, `context_norm`, `final_norm`; a copy
                                                                   of the embedding; target_layer_ids null
speculators (`models/dflash`, `convert/dflash`)                    speculators_model_type, copies of target's tensors

Layers that no list names are spread over the target as all of these do it: one in the middle, or evenly from the second
to the third last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchspec.core.algorithms.blocks.geometry import spread_taps
from torchspec.core.errors import CheckpointError
from torchspec.core.export.draft_config import object_at
from torchspec.core.export.speculators import is_speculators
from torchspec.core.export.tidy import tidied
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec

RENAMED = {"context_proj.": "fc.", "context_norm.": "hidden_norm.", "final_norm.": "norm.", "logit_head.": ""}
ATTENTION = ("gqa", "mha")


def published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    """See `AlgorithmSpec.published`, of files that are known to be a draft of blocks."""
    files = tidied(files)
    try:
        return _speculators(files) if is_speculators(files.config) else _plain(files, target)
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error


def _speculators(files: DraftFiles) -> DraftFiles:
    config, layer = files.config, object_at(files.config, "transformer_layer_config")
    _check_stated(config.get("block_size"), config.get("mask_token_id"), "", config.get("aux_hidden_state_layer_ids"))
    slides = "sliding_attention" in (layer.get("layer_types") or ())
    if config.get("sliding_window_non_causal") is not False or slides:
        return files
    note = "full layers see their whole block, as they were trained, whatever sliding_window_non_causal says"
    return replace(files, config={**config, "sliding_window_non_causal": True}, notes=(*files.notes, note))


def _plain(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    config, notes = dict(files.config), list(files.notes)
    special = dict(object_at(config, "dflash_config"))
    modes = special.get("attention_modes") or [special.get("attention_mode", ATTENTION[0])]
    odd = sorted({str(mode) for mode in modes} - set(ATTENTION))
    if odd:
        raise ValueError(f"its attention is {', '.join(odd)}; drafts of blocks here have grouped queries")
    tensors = {_named(name): tensor for name, tensor in files.tensors.items()}
    if tensors.keys() != files.tensors.keys():
        notes.append("tensors were named " + ", ".join(sorted(files.tensors.keys() - tensors.keys())[:4]))
    if special.get("mask_token_id") is None and config.get("mask_token_id") is not None:
        special["mask_token_id"] = config["mask_token_id"]
    listed = special.get("target_layer_ids") or config.get("target_layer_ids")
    if not listed:
        listed = _spread(config, tensors, target)
        if listed:
            notes.append(f"no target_layer_ids: spread over the target's layers, {listed}")
    if listed:
        special["target_layer_ids"] = list(listed)
    block = config.get("block_size", special.get("block_size"))
    _check_stated(block, special.get("mask_token_id"), "dflash_config.", listed or target is None)
    return replace(
        files, config={**config, "block_size": block, "dflash_config": special}, tensors=tensors, notes=tuple(notes)
    )


def _named(name: str) -> str:
    return next((own + name.removeprefix(old) for old, own in RENAMED.items() if name.startswith(old)), name)


def _spread(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetSpec | None) -> list[int] | None:
    """As many as `fc` reads; None where the target is needed for it and not known."""
    layers = target.num_layers if target is not None else config.get("target_num_hidden_layers")
    size = target.hidden_size if target is not None else config.get("target_hidden_size", config.get("hidden_size"))
    if "fc.weight" not in tensors or not isinstance(layers, int) or not isinstance(size, int):
        return None
    return list(spread_taps(tensors["fc.weight"].shape[-1] // size, layers))


def _check_stated(block: object, mask: object, where: str, listed: object) -> None:
    """ValueError for what no reader can guess: training had these from elsewhere, and a wrong one is a wrong draft."""
    missing = [name for name, value in (("block_size", block), (f"{where}mask_token_id", mask)) if value is None]
    missing += [] if listed else ["the tapped layers"]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: write there what the draft was "
            "trained with"
        )
