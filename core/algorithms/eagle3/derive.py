"""An EAGLE-3 or EAGLE-3.1 draft's sizes: from the target, from a draft config.json, or given one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchspec.core.algorithms.eagle3 import LATENT_ARCHITECTURES
from torchspec.core.algorithms.eagle3.geometry import (
    DEFAULT_DRAFT_VOCABULARY,
    NORMS,
    Geometry,
    default_taps,
    misfits,
)
from torchspec.core.algorithms.eagle3.latent import (
    LatentGeometry,
    latent_fields,
    latent_problems,
    refuse_latent,
    stated_fields,
)
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.export.draft_config import (
    check_full_attention,
    check_layer,
    completed,
    copy_field,
    layer_config,
    layer_fields,
    layers_listed,
    names_listed,
    object_at,
    read_config,
)
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import Sources, layer_problems


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
    problems += options.idle_problems()
    problems += layer_problems(geometry)
    if isinstance(geometry, LatentGeometry):
        problems += latent_problems(geometry)
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
    fields = sources.layer() | {
        "draft_vocab_size": sources.pick("draft_vocab_size", vocabulary, option="vocab_size"),
        "norm_before_residual": sources.pick("norm_before_residual", False),
        "vocab_size": stated.get("vocab_size", target.vocab_size),
        "target_hidden_size": stated.get("target_hidden_size", target.hidden_size),
        "num_taps": num_taps,
        # EAGLE-3 has no such options.
        **{name: sources.pick(name, getattr(sources.options, name, False)) for name in NORMS},
    }
    if sources.pick("attention", "gqa") == "mla":
        return LatentGeometry(**fields | latent_fields(sources, fields["num_attention_heads"]))
    refuse_latent(sources)
    return Geometry(**fields)


def _norm_problems(geometry: Geometry, options: Eagle3Options) -> list[Problem]:
    used = [name for name in NORMS if getattr(geometry, name)]
    if geometry.fc_norm and geometry.norm_before_fc:
        message = "one of fc_norm, which norms each tap, and norm_before_fc, which norms all together"
        return [Problem(field="draft.norm_before_fc", value=True, message=message, remedy="draft.fc_norm=false")]
    offered = set(NORMS) <= type(options).model_fields.keys()
    if offered == bool(used):
        return []
    if used:
        message = f"its {' and '.join(used)} {'is' if len(used) == 1 else 'are'} of EAGLE-3.1"
        return [Problem(field="draft.config", value=True, message=message, remedy="algorithm=eagle3.1")]
    message = "without fc_norm, norm_before_fc and norm_output this is EAGLE-3"
    return [
        Problem(field="algorithm", value="eagle3.1", message=message, remedy="algorithm=eagle3, or use one of them")
    ]


def geometry_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Geometry fields (and `taps`) stated by a config.json of the plain or the speculators layout.

    Raises ValueError for a field of the wrong type, another algorithm or a kind of layer that this draft does not have.
    """
    _check_algorithm(config)
    config = completed(config)
    layer = layer_config(config)
    check_layer(layer, "an EAGLE-3 draft", num_layers=1)
    check_full_attention(layer, "an EAGLE-3 draft")
    fields = layer_fields(layer) | _attention_fields(config, layer)
    copy_field(fields, "draft_vocab_size", config, int)
    copy_field(fields, "target_hidden_size", config, int)
    said = {**config, **{key: value for key, value in object_at(config, "eagle_config").items() if key in NORMS}}
    for name in ("norm_before_residual", *NORMS):
        copy_field(fields, name, said, bool)
    if any(name in fields for name in NORMS):  # of a config that speaks of them, what it leaves out is not there
        fields = dict.fromkeys(NORMS, False) | fields
    if "vocab_size" in fields:
        fields.setdefault("draft_vocab_size", fields["vocab_size"])
    if is_speculators(config):
        # The vLLM numbering: id l + 1 is the output of layer l.
        ids = layers_listed(config, "eagle_aux_hidden_state_layer_ids")
        fields |= {} if ids is None else {"taps": tuple(number - 1 for number in ids)}
        return fields
    ids = layers_listed(object_at(config, "eagle_config"), "eagle_aux_hidden_state_layer_ids")
    ours = layers_listed(object_at(config, "torchspec"), "tap_layers")
    if ours is not None:
        fields["taps"] = ours
    elif ids:
        fields["num_taps"] = len(ids)  # engines number this list differently: how many there are can be relied on
    return fields


def _attention_fields(config: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of attention, where the config says one, and the sizes of latent attention."""
    named = names_listed(config, "architectures")
    if layer.get("kv_lora_rank") is not None or set(named) & set(LATENT_ARCHITECTURES):
        return stated_fields(layer)
    return {"attention": "gqa"} if named or is_speculators(config) else {}


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
