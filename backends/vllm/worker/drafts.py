"""Which of vLLM's methods decodes with a draft, as the draft's config.json has it. Needs no vLLM.

Given a directory alone, vLLM goes by words in its path, so it is always told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchspec.core.errors import ConfigError, Problem

SPECULATORS: dict[str, dict[str, Any]] = {
    "eagle3": {"method": "eagle3"},
    "peagle": {"method": "eagle3", "parallel_drafting": True},
    "dflash": {"method": "dflash"},
    "dspark": {"method": "dspark"},
}
"""By `speculators_model_type`."""

ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3DeepseekV2ForCausalLM": "eagle3",
    "Eagle3DeepseekV3ForCausalLM": "eagle3",
    "DFlashDraftModel": "dflash",
    "Qwen3DSparkModel": "dspark",
}
"""Of the plain layout."""

IN_PARALLEL = ("ptd_token_id", "pard_token")
"""Either says that a plain EAGLE-3 directory is P-EAGLE's."""


def speculative_config(target: Path, draft: Path, length: int) -> dict[str, Any]:
    """vLLM's `speculative_config` for a draft directory; one that is the target's own has the head inside it.

    Raises ConfigError for a draft that vLLM does not decode with.
    """
    tokens = {"num_speculative_tokens": length}
    if draft == target:
        return {"method": "mtp", **tokens}
    path = draft / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(field="draft", message=f"{path} cannot be read: {error}")]) from error
    method = _method(config)
    head = config.get("markov_head_type") or "vanilla"
    if method is None or head != "vanilla":
        named = config.get("speculators_model_type") or config.get("architectures")
        known = ", ".join([*SPECULATORS, *ARCHITECTURES])
        what = f"{named}{_projector(config)}" if method is None else f"{named} with a {head} head"
        message = f"{draft} is a draft of {what}; the vLLM worker decodes with {known}, of vanilla heads"
        raise ConfigError([Problem(field="draft", message=message, remedy="serve it with another engine")])
    return {**method, "model": str(draft), **tokens}


def _method(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if "speculators_model_type" in config:
        return SPECULATORS.get(config["speculators_model_type"])
    if any(config.get(name) is not None for name in IN_PARALLEL):
        return SPECULATORS["peagle"]
    named = next((name for name in config.get("architectures") or () if name in ARCHITECTURES), None)
    return None if named is None or _projector(config) else SPECULATORS[ARCHITECTURES[named]]


def _projector(config: Mapping[str, Any]) -> str:
    """What stands behind the layers of a block draft and vLLM would leave out: Domino's correction."""
    special = config.get("dflash_config")
    inside = special.get("projector_type") if isinstance(special, Mapping) else None
    projector = config.get("projector_type") or inside
    return "" if projector is None else f" with a projector of type {projector}"
