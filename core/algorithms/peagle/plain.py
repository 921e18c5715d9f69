"""P-EAGLE drafts as they were published before the speculators layout: an EAGLE-3 directory whose config names the
token that stands for those to be drafted, `ptd_token_id` or `pard_token`. vLLM reads them with `method: eagle3` and
`parallel_drafting: true`.

They are put in the speculators layout, which alone is written. What vLLM does not find in a config it takes as here:
layers of the target in Hugging Face's numbering, one layer, `norm_before_residual` false. A first layer may be called
`midlayer`, and what is learned in the taps' place has one axis or two of length 1 before its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchspec.core.errors import CheckpointError
from torchspec.core.export.draft_config import object_at
from torchspec.core.export.speculators import is_speculators
from torchspec.core.export.tidy import tidied
from torchspec.core.interfaces.algorithm import DraftFiles

MASKS = ("ptd_token_id", "pard_token")
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "PEagleDraftModel", "LlamaForCausalLM")
"""Some name the target's, as vLLM puts its own name for EAGLE-3 in the place of any."""
TAPS = "eagle_aux_hidden_state_layer_ids"
BESIDE = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes such a draft: a language model's alone names no such token."""
    named = config.get("architectures")
    fits = isinstance(named, list) and not set(named).isdisjoint(ARCHITECTURES)
    return fits and not is_speculators(config) and any(config.get(name) is not None for name in MASKS)


def as_speculators(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config in the speculators layout; one that is there already, or is of another draft, as it is.

    Raises ValueError for fields that contradict each other.
    """
    if not is_plain(config):
        return config
    masks = {config[name] for name in MASKS if config.get(name) is not None}
    if len(masks) > 1:
        raise ValueError(f"{' and '.join(MASKS)} name different tokens: {sorted(masks, key=str)}")
    listed = config.get(TAPS) or object_at(config, "eagle_config").get(TAPS)
    return {
        "speculators_model_type": "peagle",
        "transformer_layer_config": {"num_hidden_layers": 1, **config},
        "mask_token_id": masks.pop(),
        **{name: config[name] for name in BESIDE if config.get(name) is not None},
        **({TAPS: listed} if listed else {}),
    }


def files_as_speculators(files: DraftFiles) -> DraftFiles:
    """Config and tensors in the speculators layout; see `as_speculators`."""
    config = as_speculators(files.config)
    if config is files.config:
        return files
    tensors = {}
    for name, tensor in files.tensors.items():
        inner = name.removeprefix("model.")
        own = inner.replace("midlayer.", "layers.0.", 1) if inner.startswith("midlayer.") else inner
        tensors[own] = tensor.reshape(1, 1, -1) if own == "mask_hidden" else tensor
    return replace(files, config=dict(config), tensors=tensors)


def published(files: DraftFiles) -> DraftFiles:
    """See `AlgorithmSpec.published`. What is learned in the taps' place tells a P-EAGLE draft from all others.

    SpecForge (`modeling/draft/peagle.py`) writes no token for masks, Automodel `mask_token_id`; others as above.
    """
    if not any(name.removeprefix("model.") == "mask_hidden" for name in files.tensors):
        return files
    files = tidied(files)
    config = files.config
    if not is_speculators(config) and all(config.get(name) is None for name in MASKS):
        if config.get("mask_token_id") is None:
            raise CheckpointError(
                f"config.json of the draft: {MASKS[0]} is missing: write there the token that stood for those to be "
                "drafted in training"
            )
        config = {**config, MASKS[0]: config["mask_token_id"]}
    try:
        return files_as_speculators(replace(files, config=config))
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error
