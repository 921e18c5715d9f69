"""EAGLE-3 (2503.01840) as defined in docs/concepts.md: registered as `eagle3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.interfaces.engine import TargetSpec

LATENT_ARCHITECTURES = ("Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM")
"""Of drafts with latent attention, by two names of one reader; the first is written."""


def _create(options: Eagle3Options, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.eagle3.algorithm import Eagle3

    return Eagle3.create(options, target)


def is_eagle3(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a draft of this family, with EAGLE-3.1's norms or without.

    One that names a token for what is to be drafted in parallel is P-EAGLE's.
    """
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == "eagle3")
    if is_parallel(config):
        return False
    architectures = config.get("architectures")
    names = ("LlamaForCausalLMEagle3", *LATENT_ARCHITECTURES)
    return isinstance(architectures, list) and any(name in architectures for name in names)


def is_parallel(config: Mapping[str, Any]) -> bool:
    """Whether it names a token for what is to be drafted in parallel."""
    return config.get("ptd_token_id") is not None or config.get("pard_token") is not None


def has_norms(config: dict[str, Any]) -> bool:
    """Whether it has any of EAGLE-3.1's norms; a missing field means that it has not."""
    return any(config.get(name) for name in ("fc_norm", "norm_before_fc", "norm_output"))


def _reads(config: dict[str, Any]) -> bool:
    return is_eagle3(config) and not has_norms(config)


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.eagle3.algorithm import Eagle3
    from torchspec.core.algorithms.eagle3.convert import from_files

    return from_files(files, target, Eagle3, Eagle3Options)


def as_published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    """See `published.published`."""
    from torchspec.core.algorithms.eagle3.published import published

    return published(files, target)


SPEC = AlgorithmSpec(
    name="eagle3",
    options=Eagle3Options,
    create=_create,
    reads=_reads,
    from_files=_from_files,
    published=as_published,
)
