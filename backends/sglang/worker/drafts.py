"""Which of SGLang's algorithms decodes with a draft, as the draft's config.json has it. Needs no SGLang."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchspec.core.errors import Problem

ALGORITHMS = {
    "LlamaForCausalLMEagle3": "EAGLE3",
    "Eagle3DeepseekV2ForCausalLM": "EAGLE3",
    "Eagle3DeepseekV3ForCausalLM": "EAGLE3",
    "DFlashDraftModel": "DFLASH",  # Domino's, too
    "Qwen3DSparkModel": "DSPARK",
}
"""By the architecture of the plain layout."""


def draft_arguments(target: Path, draft: Path, length: int) -> dict[str, Any]:
    """Of `sglang.Engine`, for a draft without `draft_problems`; one that is the target's own has the head inside it.

    What SGLang verifies at a time counts the token that is known.
    """
    algorithm = "NEXTN" if draft == target else ALGORITHMS[_architecture(_read(draft))]
    arguments = {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(draft),
        "speculative_num_draft_tokens": length + 1,
    }
    if algorithm in ("EAGLE3", "NEXTN"):  # the others draft in one step
        arguments |= {"speculative_num_steps": length, "speculative_eagle_topk": 1}
    return arguments


def draft_problems(target: Path, draft: Path) -> list[Problem]:
    """Why SGLang has no algorithm for this draft; which devices an algorithm runs on, SGLang says itself."""
    if draft == target:
        return []
    try:
        config = _read(draft)
    except (OSError, ValueError) as error:
        return [Problem(field="draft", message=f"{draft / 'config.json'} cannot be read: {error}")]
    kind = _architecture(config)
    if kind not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        message = f"{draft} is a draft of {kind}; the SGLang worker decodes with plain drafts of {known}"
        return [Problem(field="draft", message=message, remedy="export the draft in its plain form")]
    return []


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("speculators_model_type") or config.get("architectures")
    return str(named[0]) if isinstance(named, list) and len(named) == 1 else str(named)


def _read(draft: Path) -> dict[str, Any]:
    found = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found
