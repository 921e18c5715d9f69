"""The sizes of a P-EAGLE draft: EAGLE-3's, how many layers, and the token that stands for what is to be drafted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.core.algorithms.eagle3.geometry import DEFAULT_DRAFT_VOCABULARY, Geometry, default_taps, misfits
from torchspec.core.algorithms.peagle.options import PEagleOptions
from torchspec.core.algorithms.peagle.plain import as_speculators
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.export.draft_config import (
    check_full_attention,
    check_layer,
    completed,
    copy_field,
    layer_config,
    layer_fields,
    layers_listed,
    read_config,
)
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import Sources, layer_problems


@dataclass(frozen=True, kw_only=True)
class PEagleGeometry(Geometry):
    """Everything that fixes the draft's parameters and arithmetic, beside the weights."""

    num_layers: int
    mask_token: int

    @property
    def tapped_size(self) -> int:
        """Width of what fc reads, F."""
        return self.num_taps * self.target_hidden_size


def derive(
    options: PEagleOptions, target: TargetSpec, stated: Mapping[str, Any] | None = None
) -> tuple[PEagleGeometry, tuple[int, ...]]:
    """The draft's geometry and taps. Raises ConfigError with every misfit of options, draft config and target.

    `stated` are the fields of a draft config already read (`geometry_fields`), in place of `options.config`.
    """
    problems: list[Problem] = []
    given: dict[str, Any] = dict(stated or {})
    if options.config is not None:
        try:
            given = geometry_fields(read_config(options.config))
        except ValueError as error:
            problems.append(Problem(field="draft.config", value=str(options.config), message=str(error)))
    sources = Sources(options=options, stated=given, target=target, problems=problems)
    taps = sources.taps(options.taps, default_taps(target.num_layers))
    vocabulary = min(DEFAULT_DRAFT_VOCABULARY, target.vocab_size)
    geometry = PEagleGeometry(
        **sources.layer(),
        draft_vocab_size=sources.pick("draft_vocab_size", vocabulary, option="vocab_size"),
        norm_before_residual=sources.pick("norm_before_residual", False),
        vocab_size=given.get("vocab_size", target.vocab_size),
        target_hidden_size=given.get("target_hidden_size", target.hidden_size),
        num_taps=len(taps),
        num_layers=sources.pick("num_layers", PEagleOptions.model_fields["num_layers"].default),
        mask_token=sources.pick("mask_token", target.vocab_size - 1),
    )
    problems += misfits(geometry, target)
    problems += options.idle_problems()
    problems += layer_problems(geometry)
    if geometry.mask_token >= target.vocab_size:
        problems.append(
            Problem(
                field="draft.mask_token",
                value=geometry.mask_token,
                message=f"the target has the tokens 0..{target.vocab_size - 1}",
                remedy="name one that texts do not contain, or none: the last one is the default",
            )
        )
    if problems:
        raise ConfigError(problems)
    return geometry, taps


def geometry_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Geometry fields (and `taps`) stated by a config.json of the speculators layout, or by one of `peagle.plain`.

    Raises ValueError for a field of the wrong type, another algorithm or a kind of layer that this draft does not have.
    """
    config = as_speculators(config)
    kind = config.get("speculators_model_type")
    if not is_speculators(config) or kind != "peagle":
        raise ValueError(f"speculators_model_type is {kind!r}; a P-EAGLE draft here has 'peagle'")
    for name in ("norm_before_fc", "fc_norm", "norm_output"):
        if config.get(name):
            raise ValueError(f"{name} is {config[name]!r}; a P-EAGLE draft here has False")
    config = completed(config)
    layer = layer_config(config)
    if layer.get("model_type", "llama") != "llama":
        raise ValueError(f"model_type is {layer['model_type']!r}; a P-EAGLE draft here has 'llama'")
    check_layer(layer, "a P-EAGLE draft")
    check_full_attention(layer, "a P-EAGLE draft")
    fields = layer_fields(layer)
    copied: dict[str, Any] = {}
    copy_field(copied, "num_hidden_layers", layer, int)
    copy_field(fields, "draft_vocab_size", config, int)
    copy_field(fields, "target_hidden_size", config, int)
    copy_field(fields, "norm_before_residual", config, bool)
    if "num_hidden_layers" in copied:
        fields["num_layers"] = copied["num_hidden_layers"]
    if "vocab_size" in fields:
        fields.setdefault("draft_vocab_size", fields["vocab_size"])
    mask = config.get("mask_token_id")
    if mask is not None:
        if type(mask) is not int or mask < 0:
            raise ValueError(f"mask_token_id must be a token's number, got {mask!r}")
        fields["mask_token"] = mask
    # The vLLM numbering: id l + 1 is the output of layer l.
    ids = layers_listed(config, "eagle_aux_hidden_state_layer_ids")
    return fields if ids is None else fields | {"taps": tuple(number - 1 for number in ids)}
