"""EAGLE-3 drafts as others publish them, put into the layouts of `convert`.

Told by class and tensors, since config.json may name the target's class, too: beside `fc` a layer with a norm of its
own for the feature (`midlayer.hidden_norm` or `layers.0.hidden_norm`). Seen in

EAGLE's own repository (`model/cnets.py`, `traineagle3/config.json`)     LlamaForCausalLM, `midlayer`, a pickle
SpecForge (`configs/*-eagle3.json`, `export/to_hf.py`)                   LlamaForCausalLMEagle3, `midlayer`
AngelSlim (`train/configs/qwen3-8b-eagle3.json`)                         Eagle3LlamaForCausalLM, `midlayer`
ModelOpt (`export/plugins/hf_spec_export.py`)                            LlamaForCausalLMEagle3, `layers.0`, no t2d
TorchSpec (`tools/convert_to_hf.py`, with --vllm)                        LlamaForCausalLMEagle3, `layers.0`
speculators (`models/eagle3`)                                            speculators_model_type, `layers.0`, copies of
                                                                         the target's tensors from 0.1 on

What engines do where a draft is silent is done here, too (SGLang and vLLM `llama_eagle3.py`): without a head it uses
the target's, with `tie_word_embeddings` the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3 import LATENT_ARCHITECTURES, is_parallel
from torchspec.core.errors import CheckpointError
from torchspec.core.export.draft_config import layer_config, layers_listed, object_at
from torchspec.core.export.draft_tensors import read_vocabulary
from torchspec.core.export.tidy import tidied
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_head import load_target_head

ARCHITECTURE = "LlamaForCausalLMEagle3"
OTHER_NAMES = (
    "Eagle3LlamaForCausalLM",
    "EAGLE3LlamaForCausalLM",
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
    "LlamaForCausalLM",
)
KNOWN_BY = ("midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight")
LATENT = "self_attn.kv_a_proj_with_mqa.weight"
TAP_IDS = "eagle_aux_hidden_state_layer_ids"
LEGACY_NORMS = {"aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2."}
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    """See `AlgorithmSpec.published`."""
    config = files.config
    kind = config.get("speculators_model_type")
    if not (kind == "eagle3" or (kind is None and _is_named(config))) or not _is_eagle3(files.tensors):
        return files
    files = tidied(files)
    try:
        files = _plain(files) if kind is None else files
        return _with_head(files, target)
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error


def _is_named(config: Mapping[str, Any]) -> bool:
    """Whether a plain config can be such a draft's: by a name for it, or by none beside a vocabulary of its own."""
    named = config.get("architectures")
    if is_parallel(config):
        return False
    if named is None:
        return config.get("draft_vocab_size") is not None
    return isinstance(named, list) and not {ARCHITECTURE, *LATENT_ARCHITECTURES, *OTHER_NAMES}.isdisjoint(named)


def _is_eagle3(tensors: Mapping[str, Tensor]) -> bool:
    ours = any(name.endswith(known) for name in tensors for known in KNOWN_BY)
    return ours and any(name.endswith("fc.weight") for name in tensors) and "mask_hidden" not in tensors


def _plain(files: DraftFiles) -> DraftFiles:
    """The plain layout's names, and its fields where its readers look for them. Raises ValueError."""
    config, notes = dict(files.config), list(files.notes)
    inner = object_at(config, "eagle_config")
    if inner.get("use_aux_hidden_state") is False:
        raise CheckpointError(
            "eagle_config.use_aux_hidden_state is false: the draft reads the target's last hidden state in place of "
            "taps, as EAGLE-2 does, which no algorithm here trains"
        )
    tensors = {_named(name): tensor for name, tensor in files.tensors.items()}
    named = config.get("architectures") or []
    if set(named).isdisjoint({ARCHITECTURE, *LATENT_ARCHITECTURES}):
        latent = any(name.endswith(LATENT) for name in tensors)
        config["architectures"] = [LATENT_ARCHITECTURES[0] if latent else ARCHITECTURE]
        notes.append(f"config.json names {', '.join(named) or 'no class'}: read as {config['architectures'][0]}")
    if config.pop("use_aux_norm", None) or any(name.startswith("fc_norm.") for name in tensors):
        config["fc_norm"] = True
    if "norm_before_fc" in inner:
        config["norm_before_fc"] = inner["norm_before_fc"]
    taps, how = _taps(config, inner)
    if TAP_IDS in inner and not inner[TAP_IDS]:
        config["eagle_config"] = {key: value for key, value in inner.items() if key != TAP_IDS}
    if how:
        notes.append(f"{how}: it taps the outputs of the layers {list(taps)}")
        config.pop(TAP_IDS, None)
        config["eagle_config"] = {**inner, TAP_IDS: list(taps)}
    return replace(files, config=config, tensors=tensors, notes=tuple(notes))


def _named(name: str) -> str:
    for legacy, own in LEGACY_NORMS.items():
        name = name.replace(legacy, own, 1) if name.startswith(legacy) else name
    return re.sub(r"^layers\.0\.", "midlayer.", name)


def _taps(config: Mapping[str, Any], inner: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """The tapped layers, 0-based, where a list that is not ours says them, and how it was read. An empty list is as
    good as none: the default layers."""
    top, listed = layers_listed(config, TAP_IDS), layers_listed(inner, TAP_IDS)
    if object_at(config, "torchspec").get("tap_layers") is not None:
        return (), ""
    if top:
        return tuple(number - 1 for number in top), f"{TAP_IDS} is at the top of config.json, where vLLM alone looks"
    if listed:
        return listed, f"eagle_config.{TAP_IDS} is read as SGLang numbers it"
    return (), ""


def _with_head(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    """With `lm_head`, which some leave out. Raises ValueError."""
    if HEAD in files.tensors:
        return files
    tied = bool(files.config.get("tie_word_embeddings"))
    if tied and EMBEDDING in files.tensors:
        head_NH, note = files.tensors[EMBEDDING].clone(), "its head is its embedding (tie_word_embeddings)"
    elif target is None:
        whose = "embedding" if tied else "head"
        return replace(
            files, notes=(*files.notes, f"it has no head of its own: the target's {whose} is to be its head")
        )
    else:
        ends = load_target_head(
            target.path,
            dtype=files.tensors["fc.weight"].dtype,
            device=torch.device("cpu"),
            trust_remote_code=target.trust_remote_code,
        )
        said = files.config.get("draft_vocab_size") or layer_config(files.config).get("vocab_size") or target.vocab_size
        ids_N = read_vocabulary(files.tensors, int(said), target.vocab_size).ids_N
        head_NH = (ends.embedding_VH[ids_N] if tied else ends.rows(ids_N)).clone()
        note = f"it has no head of its own: the target's {'embedding' if tied else 'head'} is put in its place"
    return replace(files, tensors={**files.tensors, HEAD: head_NH}, notes=(*files.notes, note))
