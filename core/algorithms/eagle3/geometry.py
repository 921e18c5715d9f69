"""The sizes of an EAGLE-3 or EAGLE-3.1 draft: from the target, from a draft config.json, or given one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.export.draft_config import (
    check_layer,
    copy_field,
    is_speculators,
    layer_config,
    layer_fields,
    layers_listed,
    names_listed,
    object_at,
    read_config,
)
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import LayerGeometry, Sources, layer_problems

DEFAULT_DRAFT_VOCABULARY = 32000

NORMS = ("fc_norm", "norm_output")
"""What EAGLE-3.1 adds, by the names of options, of fields of the geometry, and of fields of published configs."""


@dataclass(frozen=True, kw_only=True)
class Geometry(LayerGeometry):
    """Everything that fixes the draft's parameters and arithmetic, beside the weights.

    fc_norm        each tap is normed, with its own weight, before fc
    norm_output    a step's feature is the output of the step before after the final norm
    With neither it is EAGLE-3 (2503.01840), with either EAGLE-3.1 (2605.09992).
    """

    draft_vocab_size: int
    vocab_size: int
    target_hidden_size: int
    num_taps: int
    norm_before_residual: bool
    fc_norm: bool = False
    norm_output: bool = False

    @property
    def owns_embedding(self) -> bool:
        """Whether the draft trains its own embedding: the target's does not fit its hidden size."""
        return self.hidden_size != self.target_hidden_size


def default_taps(num_layers: int) -> tuple[int, ...]:
    """One early, one middle, one late layer, as the engines default to (formats of the field)."""
    return (1, num_layers // 2 - 1, num_layers - 4)


def derive(
    options: Eagle3Options, target: TargetSpec, stated: Mapping[str, Any] | None = None
) -> tuple[Geometry, tuple[int, ...]]:
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
    geometry = _geometry(sources, len(taps))
    problems += misfits(geometry, target)
    problems += _norm_problems(geometry, options)
    problems += layer_problems(geometry)
    if "num_taps" in given and given["num_taps"] != len(taps):
        problems.append(
            Problem(
                field="draft.taps",
                value=taps,
                message=f"the draft config is for {given['num_taps']} taps",
                remedy="give as many taps as it names",
            )
        )
    if problems:
        raise ConfigError(problems)
    return geometry, taps


def _geometry(sources: Sources, num_taps: int) -> Geometry:
    target, stated = sources.target, sources.stated
    vocabulary = min(DEFAULT_DRAFT_VOCABULARY, target.vocab_size)
    return Geometry(
        **sources.layer(),
        draft_vocab_size=sources.pick("draft_vocab_size", vocabulary, option="vocab_size"),
        norm_before_residual=sources.pick("norm_before_residual", False),
        vocab_size=stated.get("vocab_size", target.vocab_size),
        target_hidden_size=stated.get("target_hidden_size", target.hidden_size),
        num_taps=num_taps,
        # EAGLE-3 has no such options.
        **{name: sources.pick(name, getattr(sources.options, name, False)) for name in NORMS},
    )


def _norm_problems(geometry: Geometry, options: Eagle3Options) -> list[Problem]:
    used = [name for name in NORMS if getattr(geometry, name)]
    offered = set(NORMS) <= type(options).model_fields.keys()
    if offered == bool(used):
        return []
    if used:
        message = f"its {' and '.join(used)} {'is' if len(used) == 1 else 'are'} of EAGLE-3.1"
        return [Problem(field="draft.config", value=True, message=message, remedy="algorithm=eagle3.1")]
    message = "without fc_norm and norm_output this is EAGLE-3"
    return [
        Problem(field="algorithm", value="eagle3.1", message=message, remedy="algorithm=eagle3, or use one of them")
    ]


def misfits(geometry: Geometry, target: TargetSpec) -> list[Problem]:
    """Where the draft does not belong to the target."""
    problems = []
    for name, wanted, what in (
        ("vocab_size", target.vocab_size, "the target's"),
        ("target_hidden_size", target.hidden_size, "the target's hidden size"),
    ):
        value = getattr(geometry, name)
        if value != wanted:
            problems.append(
                Problem(
                    field="draft.config",
                    value=value,
                    message=f"its {name} must be {what}, {wanted}",
                    remedy="use a draft config made for this target",
                )
            )
    if geometry.draft_vocab_size > target.vocab_size:
        problems.append(
            Problem(
                field="draft.vocab_size",
                value=geometry.draft_vocab_size,
                message=f"the draft cannot have more tokens than the target's {target.vocab_size}",
            )
        )
    return problems


def geometry_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Geometry fields (and `taps`) stated by a config.json of the plain or the speculators layout.

    Raises ValueError for a field of the wrong type, another algorithm or a kind of layer that this draft does not have.
    """
    _check_algorithm(config)
    layer = layer_config(config)
    check_layer(layer, "an EAGLE-3 draft", num_layers=1)
    if config.get("norm_before_fc"):
        raise ValueError("norm_before_fc, one norm of all taps together, is not trained here; fc_norm norms each tap")
    fields = layer_fields(layer)
    copy_field(fields, "draft_vocab_size", config, int)
    copy_field(fields, "target_hidden_size", config, int)
    for name in ("norm_before_residual", *NORMS):
        copy_field(fields, name, config, bool)
    if "vocab_size" in fields:
        fields.setdefault("draft_vocab_size", fields["vocab_size"])
    if is_speculators(config):
        # The vLLM numbering: id l + 1 is the output of layer l.
        ids = layers_listed(config, "eagle_aux_hidden_state_layer_ids")
        fields |= {} if ids is None else {"taps": tuple(number - 1 for number in ids)}
    else:
        # Engines number the plain layout's ids differently, so only how many there are can be relied on.
        ids = layers_listed(object_at(config, "eagle_config"), "eagle_aux_hidden_state_layer_ids")
        fields |= {} if ids is None else {"num_taps": len(ids)}
    return fields


def _check_algorithm(config: Mapping[str, Any]) -> None:
    """A config may name its algorithm; a speculators one always does, and then its architectures say no more."""
    if is_speculators(config):
        kind = config["speculators_model_type"]
        if kind != "eagle3":
            raise ValueError(f"speculators_model_type is {kind!r}; an EAGLE-3 draft here has 'eagle3'")
        return
    named = names_listed(config, "architectures")
    if named and not any("eagle3" in name.lower() or name == "LlamaForCausalLM" for name in named):
        raise ValueError(f"architectures is {list(named)}; an EAGLE-3 draft here has ['LlamaForCausalLMEagle3']")
