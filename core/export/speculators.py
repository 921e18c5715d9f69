"""The layout of the speculators library, as far as a config tells it. Light: engines' workers read drafts, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_speculators(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config


def verified_by(config: Mapping[str, Any], target: str) -> dict[str, Any]:
    """A config in which the target that verifies has this name, where it names one at all."""
    described = config.get("speculators_config")
    if not isinstance(described, Mapping) or "verifier" not in described:
        return dict(config)
    verifier = {**described["verifier"], "name_or_path": target}
    return {**config, "speculators_config": {**described, "verifier": verifier}}
