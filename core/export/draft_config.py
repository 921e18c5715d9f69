"""Fields of draft config.json files that several algorithms share: written, and read with one clear error each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, LlamaConfig

from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import SIZES, LayerGeometry
from torchspec.core.models.layers import llama_rope

SPECULATORS_VERSION = "0.3.0"
DEFAULT_ROPE_THETA = 10000.0
_SIZING = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "sliding_window", "use_sliding_window",
    "max_window_layers",
)  # fmt: skip
"""Fields from which a config's class makes defaults for others."""


def llama_fields(geometry: LayerGeometry, vocab_size: int, dtype: str, *, num_layers: int = 1) -> dict[str, Any]:
    """A Llama config of such layers over the target's vocabulary; `dtype` as in "bfloat16".

    Rope is written for both kinds of reader: newer ones take `rope_parameters`, older ones `rope_theta` with
    `rope_scaling`, which must be null (and never {"rope_type": "default"}) for plain rotary.
    """
    rope = dict(geometry.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "model_type": "llama",
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_key_value_heads,
        "head_dim": geometry.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": geometry.rms_norm_eps,
        "max_position_embeddings": geometry.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
        "rope_parameters": rope,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def speculators_fields(kind: str, target: TargetSpec, layer: Mapping[str, Any], *, tokens: int) -> dict[str, Any]:
    """What every speculators config holds: its `kind` of draft, the layer's config, the target that verifies, and how
    many `tokens` to draft a round. With these `vllm serve DIR` needs no other argument."""
    return {
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": str(target.path), "architectures": [target.architecture]},
        },
        "transformer_layer_config": dict(layer),
        "tie_word_embeddings": False,
        "torch_dtype": layer["torch_dtype"],
    }


def read_config(path: Path) -> dict[str, Any]:
    """A draft's config.json. Raises ValueError saying what is wrong with the file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("is not a JSON object")
    return config


def layer_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the layer's fields stand: inside a speculators config, else in the config itself. Raises ValueError."""
    layer = config.get("transformer_layer_config") if is_speculators(config) else config
    if not isinstance(layer, Mapping):
        raise ValueError("a speculators config needs a transformer_layer_config object")
    return layer


def with_layer(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config with these fields in the layer's part; raises ValueError where a speculators config has none."""
    if not is_speculators(config):
        return {**config, **fields}
    return {**config, "transformer_layer_config": {**layer_config(config), **fields}}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that names its draft, with what its layer's part leaves unsaid: engines take the defaults of the class
    that `model_type` names (a Llama's where there is none), not the target's values. One that names no draft, as people
    write them for a few sizes alone, stays as it is. Raises ValueError.
    """
    layer = dict(layer_config(config))
    if not is_speculators(config) and not config.get("architectures"):
        return dict(config)
    known = CONFIG_MAPPING[layer["model_type"]] if layer.get("model_type") in CONFIG_MAPPING else LlamaConfig
    # What is of the wrong type is named where it is read.
    try:
        made = known(**{name: layer[name] for name in _SIZING if type(layer.get(name)) in (int, bool)})
    except StrictDataclassError as error:  # sizes that do not go together, which is no ValueError there
        raise ValueError(str(error.__cause__ or error)) from error
    for name in (*SIZES, "rms_norm_eps", "max_position_embeddings"):
        value = getattr(made, name, None)
        if layer.get(name) is None and value is not None:
            layer[name] = value
    parameters, theta = object_at(layer, "rope_parameters"), layer.get("rope_theta")
    if theta is None and "rope_theta" not in parameters:
        layer["rope_theta"] = (getattr(made, "rope_parameters", None) or {}).get("rope_theta", DEFAULT_ROPE_THETA)
    if not names_listed(layer, "layer_types") and "sliding_attention" in (getattr(made, "layer_types", None) or ()):
        layer["layer_types"] = list(made.layer_types)
    return with_layer(config, layer)


def layer_fields(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LayerGeometry` that a layer's config states, and its `vocab_size`.

    Raises ValueError for a value of the wrong type.
    """
    fields: dict[str, Any] = {}
    for name in (*SIZES, "vocab_size", "max_position_embeddings"):
        copy_field(fields, name, layer, int)
    copy_field(fields, "rms_norm_eps", layer, float)
    if "head_dim" not in fields and {"hidden_size", "num_attention_heads"} <= fields.keys():
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    rope = rope_stated(layer)
    return fields | {"rope_parameters": rope} if rope else fields


def check_layer(layer: Mapping[str, Any], draft: str, *, num_layers: int | None = None) -> None:
    """ValueError for a kind of layer that no draft here has; `draft` says whose config it is: "an EAGLE-3 draft"."""
    for name, wanted in (("num_hidden_layers", num_layers), ("hidden_act", "silu")):
        if wanted is not None and name in layer and layer[name] != wanted:
            raise ValueError(f"{name} is {layer[name]!r}; {draft} here has {wanted!r}")
    for name in ("attention_bias", "mlp_bias"):
        if layer.get(name):
            raise ValueError(f"{name} is {layer[name]!r}; {draft} here has False")
    for place in (layer, object_at(layer, "rope_parameters"), object_at(layer, "rope_scaling")):
        if place.get("partial_rotary_factor", 1) not in (None, 1):
            part = place["partial_rotary_factor"]
            raise ValueError(f"partial_rotary_factor is {part!r}; {draft} here rotates whole heads")


def check_full_attention(layer: Mapping[str, Any], draft: str) -> None:
    """ValueError for a layer that looks back only so far, where no draft of this kind has one here."""
    slides = "sliding_attention" in names_listed(layer, "layer_types")
    if slides or (layer.get("use_sliding_window") and layer.get("sliding_window")):
        window = layer.get("sliding_window")
        raise ValueError(f"its layer sees {window} positions back; {draft} here sees the whole text")


def rope_stated(layer: Mapping[str, Any]) -> dict[str, object]:
    """From either writer's fields: `rope_parameters`, or `rope_theta` with `rope_scaling`; empty where there are none.

    Raises ValueError for fields of the wrong type.
    """
    parameters, theta = object_at(layer, "rope_parameters"), layer.get("rope_theta")
    if not parameters and theta is not None:
        scaling = dict(object_at(layer, "rope_scaling"))
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling["type"])
        parameters = {"rope_type": "default", **scaling, "rope_theta": theta}
    elif parameters and "rope_theta" not in parameters and theta is not None:
        parameters = {**parameters, "rope_theta": theta}
    if parameters.get("rope_type") == "mrope":
        parameters = {**parameters, "rope_type": "default"}  # in texts without pictures all sections count alike
    theta = parameters.get("rope_theta", 1.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
    return llama_rope(parameters)


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


def names_listed(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The names under a key; none where it is missing. Raises ValueError for anything else."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names, got {value!r}")
    return tuple(value)


def copy_field(fields: dict[str, Any], name: str, source: Mapping[str, Any], kind: type) -> None:
    """fields[name] = source[name], unless it is missing or null. Raises ValueError unless it is of that kind: bool,
    float, str, or int, which means a positive one."""
    value = source.get(name)
    if value is None:
        return
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (kind is not bool and isinstance(value, bool)) or (kind is int and value < 1):
        raise ValueError(f"{name} must be {'a positive integer' if kind is int else kind.__name__}, got {value!r}")
    fields[name] = value
