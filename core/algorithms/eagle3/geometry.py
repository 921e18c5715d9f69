"""The sizes of an EAGLE-3 draft: derived from the target, from a draft config.json, or given one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.layers import Rotary, llama_rope

DEFAULT_DRAFT_VOCABULARY = 32000
SMALLEST_TARGET_FOR_DEFAULT_TAPS = 7

# Field of the geometry -> its option; sizes for which the target's own is the default.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything that fixes the draft's parameters and arithmetic, beside the weights."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    draft_vocab_size: int
    vocab_size: int
    target_hidden_size: int
    num_taps: int
    rms_norm_eps: float
    rope_parameters: dict[str, object]
    max_position_embeddings: int
    norm_before_residual: bool

    @property
    def owns_embedding(self) -> bool:
        """Whether the draft trains its own embedding: the target's does not fit its hidden size."""
        return self.hidden_size != self.target_hidden_size

    def rotary(self) -> Rotary:
        return Rotary.from_parameters(self.rope_parameters, self.head_dim, self.max_position_embeddings)


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
            given = read_draft_config(options.config)
        except ValueError as error:
            problems.append(Problem(field="draft.config", value=str(options.config), message=str(error)))
    taps = _taps(options, given, target, problems)
    geometry = _geometry(options, given, target, len(taps), problems)
    _check_geometry(geometry, target, problems)
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


def _taps(
    options: Eagle3Options, given: Mapping[str, Any], target: TargetSpec, problems: list[Problem]
) -> tuple[int, ...]:
    layers = target.num_layers
    listed = options.taps if options.taps is not None else given.get("taps")
    if listed is None:
        taps = default_taps(layers)
        if layers < SMALLEST_TARGET_FOR_DEFAULT_TAPS:
            problems.append(
                Problem(
                    field="draft.taps",
                    message=f"the default taps {list(taps)} collide on a target of {layers} layers",
                    remedy=f"name the layers to read, 0-based and below {layers}, such as draft.taps=[{layers - 1}]",
                )
            )
        return taps
    taps = tuple(listed)
    source = "draft.taps" if options.taps is not None else "draft.config"
    outside = [tap for tap in taps if not 0 <= tap < layers]
    if outside:
        problems.append(
            Problem(field=source, value=taps, message=f"the target has layers 0..{layers - 1}: no {outside}")
        )
    if not taps:
        problems.append(Problem(field=source, value=taps, message="at least one tap is needed"))
    elif list(taps) != sorted(set(taps)):
        problems.append(
            Problem(
                field=source,
                value=taps,
                message="taps must be different layers in ascending order, the order in which engines hand them over",
                remedy=f"draft.taps={sorted(set(taps))}",
            )
        )
    return taps


def _geometry(
    options: Eagle3Options, given: Mapping[str, Any], target: TargetSpec, num_taps: int, problems: list[Problem]
) -> Geometry:
    def pick(name: str, option: str, default: Any) -> Any:
        explicit = getattr(options, option) if option in options.model_fields_set else None
        if explicit is not None and name in given and given[name] != explicit:
            problems.append(
                Problem(
                    field=f"draft.{option}",
                    value=explicit,
                    message=f"the draft config says {given[name]}",
                    remedy="give it in one place",
                )
            )
        return explicit if explicit is not None else given.get(name, default)

    return Geometry(
        **{name: pick(name, name, getattr(target, name)) for name in _SIZES},
        draft_vocab_size=pick("draft_vocab_size", "vocab_size", min(DEFAULT_DRAFT_VOCABULARY, target.vocab_size)),
        norm_before_residual=pick("norm_before_residual", "norm_before_residual", False),
        vocab_size=given.get("vocab_size", target.vocab_size),
        target_hidden_size=given.get("target_hidden_size", target.hidden_size),
        num_taps=num_taps,
        rms_norm_eps=given.get("rms_norm_eps", target.rms_norm_eps),
        rope_parameters=given.get("rope_parameters", llama_rope(target.rope_parameters)),
        max_position_embeddings=given.get("max_position_embeddings", target.max_position_embeddings),
    )


def _check_geometry(geometry: Geometry, target: TargetSpec, problems: list[Problem]) -> None:
    def check(wrong: bool, field: str, value: object, message: str, remedy: str = "") -> None:
        if wrong:
            problems.append(Problem(field=field, value=value, message=message, remedy=remedy))

    heads, kv_heads, width = geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim
    vocab, size = target.vocab_size, target.hidden_size
    check(
        geometry.vocab_size != vocab,
        "draft.config",
        geometry.vocab_size,
        f"its vocab_size must be the target's, {vocab}",
        "use a draft config made for this target",
    )
    check(
        geometry.target_hidden_size != size,
        "draft.config",
        geometry.target_hidden_size,
        f"its target_hidden_size must be the target's hidden size, {size}",
        "use a draft config made for this target",
    )
    check(
        geometry.draft_vocab_size > vocab,
        "draft.vocab_size",
        geometry.draft_vocab_size,
        f"the draft cannot have more tokens than the target's {vocab}",
    )
    check(
        heads % kv_heads != 0,
        "draft.num_key_value_heads",
        kv_heads,
        f"must divide the {heads} attention heads",
    )
    check(width % 2 != 0, "draft.head_dim", width, "must be even: rotary embedding turns pairs")
    if "rope_theta" not in geometry.rope_parameters:
        problems.append(
            Problem(
                field="draft.config",
                value=geometry.rope_parameters,
                message="no single rope_theta is known for the draft",
                remedy="give a draft config.json with rope_parameters",
            )
        )
        return
    try:
        replace(geometry, head_dim=width + width % 2).rotary()  # an odd width is reported above
    except (ValueError, KeyError) as error:
        problems.append(
            Problem(
                field="draft.config",
                value=geometry.rope_parameters,
                message=f"rotary embedding: {error}",
                remedy="give a draft config.json with rope_parameters of a supported kind",
            )
        )


def read_draft_config(path: Path) -> dict[str, Any]:
    """The geometry fields that a draft's config.json states. Raises ValueError saying what is wrong with the file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("is not a JSON object")
    return geometry_fields(config)


def geometry_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Geometry fields (and `taps`) stated by a config.json of the plain or the speculators layout.

    Raises ValueError for a field of the wrong type, another algorithm or a kind of layer that this draft does not have.
    """
    _check_algorithm(config)
    speculators = "speculators_model_type" in config
    layer = config.get("transformer_layer_config") if speculators else config
    if not isinstance(layer, Mapping):
        raise ValueError("a speculators config needs a transformer_layer_config object")
    _check_layer(layer, config)
    fields: dict[str, Any] = {}
    for name in (*_SIZES, "vocab_size", "max_position_embeddings"):
        _copy(fields, name, layer, name, int)
    _copy(fields, "rms_norm_eps", layer, "rms_norm_eps", float)
    _copy(fields, "draft_vocab_size", config, "draft_vocab_size", int)
    _copy(fields, "target_hidden_size", config, "target_hidden_size", int)
    _copy(fields, "norm_before_residual", config, "norm_before_residual", bool)
    if "vocab_size" in fields:
        fields.setdefault("draft_vocab_size", fields["vocab_size"])
    if "head_dim" not in fields and {"hidden_size", "num_attention_heads"} <= fields.keys():
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    rope = _rope(layer)
    if rope:
        fields["rope_parameters"] = rope
    if speculators:
        # The vLLM numbering: id l + 1 is the output of layer l.
        ids = layers_listed(config, "eagle_aux_hidden_state_layer_ids")
        fields |= {} if ids is None else {"taps": tuple(number - 1 for number in ids)}
    else:
        # Engines number the plain layout's ids differently, so only how many there are can be relied on.
        ids = layers_listed(object_at(config, "eagle_config"), "eagle_aux_hidden_state_layer_ids")
        fields |= {} if ids is None else {"num_taps": len(ids)}
    return fields


def object_at(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key, an empty one where there is none. Raises ValueError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value or {}


def layers_listed(config: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """The layer numbers under a key, as they stand there; None where there are none. Raises ValueError for others."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ValueError(f"{key} must be a list of layer numbers, got {value!r}")
    return tuple(value)


def _check_algorithm(config: Mapping[str, Any]) -> None:
    """A config may name its algorithm; a speculators one always does, and then its architectures say no more."""
    if "speculators_model_type" in config:
        kind = config["speculators_model_type"]
        if kind != "eagle3":
            raise ValueError(f"speculators_model_type is {kind!r}; an EAGLE-3 draft here has 'eagle3'")
        return
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"architectures must be a list of names, got {named!r}")
    if named and not any("eagle3" in name.lower() or name == "LlamaForCausalLM" for name in named):
        raise ValueError(f"architectures is {named!r}; an EAGLE-3 draft here has ['LlamaForCausalLMEagle3']")


def _check_layer(layer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    expected: tuple[tuple[str, object, Callable[[Any], bool]], ...] = (
        ("num_hidden_layers", 1, lambda value: value == 1),
        ("hidden_act", "silu", lambda value: value == "silu"),
        ("attention_bias", False, lambda value: not value),
        ("mlp_bias", False, lambda value: not value),
    )
    for name, wanted, fits in expected:
        if name in layer and not fits(layer[name]):
            raise ValueError(f"{name} is {layer[name]!r}; an EAGLE-3 draft here has {wanted!r}")
    for name in ("fc_norm", "norm_output", "norm_before_fc"):
        if config.get(name):
            raise ValueError(f"{name} belongs to EAGLE-3.1, which this algorithm does not train")


def _copy(fields: dict[str, Any], name: str, source: Mapping[str, Any], key: str, kind: type) -> None:
    value = source.get(key)
    if value is None:
        return
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (kind is not bool and isinstance(value, bool)) or (kind is int and value < 1):
        raise ValueError(f"{key} must be {'a positive integer' if kind is int else kind.__name__}, got {value!r}")
    fields[name] = value


def _rope(layer: Mapping[str, Any]) -> dict[str, object]:
    """Either reader's fields: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    parameters, theta = object_at(layer, "rope_parameters"), layer.get("rope_theta")
    if not parameters and theta is not None:
        scaling = dict(object_at(layer, "rope_scaling"))
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling["type"])
        parameters = {"rope_type": "default", **scaling, "rope_theta": theta}
    theta = parameters.get("rope_theta", 1.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
    return llama_rope(parameters)
