"""What drafts of any kind may carry when others publish them, beside what is computed with: taken off, or refused.

Every step leaves what the draft computes as it is, and says in a note what it did.

Shape letters: N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchspec.core.errors import CheckpointError
from torchspec.core.export.draft_config import layer_config, object_at, with_layer
from torchspec.core.interfaces.algorithm import DraftFiles

WRAPPERS = ("draft_model.", "module.", "_orig_mod.", "eagle_module.", "dflash_module.")
"""What trainers put before every name."""
PASSENGERS = re.compile(
    r"(^|\.)(verifier_lm_head|verifier_norm)\.weight$|(^|\.)rotary_emb\.|\.(inv_freq|cos_cached|sin_cached)$"
)
"""Copies of the target's tensors for training, and tables that are made from the config."""
BIASES = re.compile(r"(^|\.)(self_attn\.[qkvo]_proj|self_attn\.qkv_proj|mlp\.\w+_proj|fc)\.bias$")
QUANTISED = re.compile(r"(_scale|_scale_inv|_scale_2|_packed|\.qweight|\.qzeros|\.scales|\.g_idx|_zero_point)$")
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VOCABULARY = ("d2t", "t2d")


def tidied(files: DraftFiles) -> DraftFiles:
    """The files without what is not computed with. Raises CheckpointError for quantised weights, for biases that are
    not zero, and for vocabulary maps that contradict each other."""
    try:
        return _tidied(files)
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error


def _tidied(files: DraftFiles) -> DraftFiles:
    notes: list[str] = []
    tensors = _unwrapped(files.tensors, notes)
    refuse_quantised(files.config, tensors)
    tensors = _without_passengers(tensors, notes)
    config, tensors = _without_biases(files.config, tensors, notes)
    config = _of_text(config, notes)
    tensors = _with_offsets(config, tensors, notes)
    return replace(files, config=config, tensors=tensors, notes=(*files.notes, *notes))


def refuse_quantised(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for weights that are not plain floating-point numbers."""
    odd = [
        name
        for name, tensor in tensors.items()
        if QUANTISED.search(name) or (name not in VOCABULARY and tensor.dtype not in PLAIN)
    ]
    if not odd:
        return
    stated = config.get("quantization_config")
    method = stated.get("quant_method") or stated.get("quant_algo") if isinstance(stated, Mapping) else None
    raise CheckpointError(
        f"the draft is quantised{f' ({method})' if method else ''}: {', '.join(sorted(odd)[:3])}"
        f"{', ...' if len(odd) > 3 else ''}. Drafts are read in float32, bfloat16 or float16: take the one that it was "
        "made from, and quantise the result again"
    )


def _unwrapped(tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    names = dict(zip(tensors, tensors, strict=True))
    for prefix in WRAPPERS:
        if names and all(name.startswith(prefix) for name in names.values()):
            names = {stored: name.removeprefix(prefix) for stored, name in names.items()}
            notes.append(f"every tensor's name began with {prefix}")
    # Of a language model's class, whose head stands beside it.
    if "model.fc.weight" in names.values():
        names = {stored: name.removeprefix("model.") for stored, name in names.items()}
        notes.append("tensors' names began with model.")
    if len(set(names.values())) < len(names):
        raise CheckpointError("the draft's tensors have the same names but for what stands before them")
    return {name: tensors[stored] for stored, name in names.items()}


def _without_passengers(tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    found = sorted(name for name in tensors if PASSENGERS.search(name))
    if found:
        notes.append(f"not the draft's own, left out: {', '.join(found)}")
    return {name: tensor for name, tensor in tensors.items() if name not in found}


def _without_biases(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Maps of drafts have no biases here. Some are published with ones that were never anything but zero."""
    biases = sorted(name for name in tensors if BIASES.search(name))
    learned = [name for name in biases if bool(tensors[name].any())]
    if learned:
        raise CheckpointError(
            f"the draft has biases that are not zero: {', '.join(learned)}. A draft's maps have none here, and without "
            "them it would compute something else"
        )
    if not biases:
        return dict(config), dict(tensors)
    notes.append(f"zero, left out: {', '.join(biases)}")
    kept = {name: tensor for name, tensor in tensors.items() if name not in biases}
    return with_layer(config, {"attention_bias": False, "mlp_bias": False}), kept


def _of_text(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Positions in sections (mrope) all count alike in text, which is what drafts are read for."""
    layer, changed = layer_config(config), {}
    for name in ("rope_scaling", "rope_parameters"):
        stated = object_at(layer, name)
        if "mrope" in (stated.get("rope_type"), stated.get("type")):
            kept = {key: value for key, value in stated.items() if key not in ("type", "mrope_section")}
            changed[name] = kept | {"rope_type": "default"} if name == "rope_parameters" else None
    if changed:
        notes.append("positions in sections (mrope) are taken as text's")
    return with_layer(config, changed)


def _with_offsets(config: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """`d2t` in offsets, as every engine reads it, and none where the draft says every token.

    Two maps that contradict each other are refused: engines go by `d2t`, trainers by `t2d`.
    """
    kept = dict(tensors)
    if "d2t" not in kept:
        return kept
    d2t_N, place_N = kept["d2t"].to(torch.int64), torch.arange(kept["d2t"].numel())
    if "t2d" in kept:
        said_N = kept["t2d"].nonzero().flatten()
        if not torch.equal(said_N, place_N + d2t_N):
            if not torch.equal(said_N, d2t_N):
                raise CheckpointError(
                    "the vocabulary maps `d2t` and `t2d` say different tokens: one of the two "
                    "belongs to another tokenizer or is damaged"
                )
            notes.append("`d2t` held the target's tokens, not offsets to them")
            d2t_N = d2t_N - place_N
    if d2t_N.numel() == layer_config(config).get("vocab_size") and not bool(d2t_N.any()):
        notes.append("a vocabulary map of every token, left out")
        return {name: tensor for name, tensor in kept.items() if name not in VOCABULARY}
    return {**kept, "d2t": d2t_N}
