"""Where a target lives and what its configuration says about it. No weight is read here."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from torchspec.core.config.environment import EMBEDDED
from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.latent import LATENT_SIZES
from torchspec.core.models.target_quantisation import read_quantisation

_CONTENTS = (
    "a target directory holds config.json, the weights as model.safetensors (or model.safetensors.index.json and its "
    "shards) and the tokenizer's files"
)


def resolve_target(path: Path | str) -> Path:
    """The directory of a target; `embedded` names the one that ships with torchspec.

    Raises TargetError when there is no such directory: torchspec never downloads.
    """
    if str(path) == EMBEDDED:
        directory = Path(str(resources.files("torchspec"))) / "assets" / "embedded_target"
        if not directory.is_dir():
            raise TargetError(f"this installation of torchspec lacks its embedded target ({directory}): reinstall it")
        return directory
    directory = Path(path).expanduser()
    if directory.is_file():
        raise TargetError(f"target {directory} is a file; give the directory it is in: {_CONTENTS}")
    if not directory.is_dir():
        raise TargetError(
            f"target directory {directory} does not exist: {_CONTENTS}. torchspec downloads nothing; "
            f"for a model of the hub run `hf download {path} --local-dir DIR` and give DIR, or use `{EMBEDDED}`"
        )
    return directory


def load_target_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The target's whole configuration as transformers reads it; see `get_text_config` for the language model's.

    Raises TargetError when config.json is missing, malformed, or of a kind that transformers does not know.
    """
    file = path / "config.json"
    content = _read_json(file, missing=f"{path} has no config.json: {_CONTENTS}")
    if "model_type" not in content:
        raise TargetError(f"{file} has no `model_type`, so it does not describe a transformers model")
    try:
        return cast(
            PreTrainedConfig,
            AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code),
        )
    except Exception as error:  # validators of any model, or the model's own code, may fail in any way
        remedy = ""
        if "auto_map" in content and not trust_remote_code:
            remedy = (
                "\nThe directory brings its own code: read it, then set target.trust_remote_code=true "
                "(eval, export, generate: --trust-remote-code)"
            )
        said = str(error).split("\n\n")[0]  # what follows in transformers' own words is how to install it
        raise TargetError(f"{file} (model_type {content['model_type']!r}) is refused: {said}{remedy}") from error


def read_target_spec(path: Path, trust_remote_code: bool = False) -> TargetSpec:
    """The facts that trainers, engines and exporters need, from the configuration alone.

    For a multimodal target they are those of its language model. `model_type` is the language model's too, while
    `architecture` is the class that serves the whole. Raises TargetError naming every fact that is missing.
    """
    config = load_target_config(path, trust_remote_code=trust_remote_code)
    ends_turns = _eos_token_ids(path, config, config.get_text_config(decoder=True), trust_remote_code)
    known = target_spec(config, path, trust_remote_code)
    return replace(known, eos_token_ids=ends_turns, quantisation=read_quantisation(path))


def target_spec(config: PreTrainedConfig, path: Path, trust_remote_code: bool = False) -> TargetSpec:
    """As `read_target_spec`, of a configuration that is here; nothing is read at `path`, nor are
    `eos_token_ids` and `quantisation`."""
    text = config.get_text_config(decoder=True)
    # Layers may differ in their heads (Gemma-4: fewer and wider ones where attention is full); most are as the first.
    layer = text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text
    required = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
    }
    facts = {name: getattr(text, key, None) for name, key in required.items()}
    missing = [required[name] for name, value in facts.items() if not isinstance(value, int)]
    if missing:
        raise TargetError(
            f"{path / 'config.json'} (model_type {text.model_type!r}) does not say {', '.join(missing)}: "
            "torchspec needs a decoder-only language model with attention layers"
        )
    hidden_size, num_heads = cast(int, facts["hidden_size"]), cast(int, facts["num_attention_heads"])
    return TargetSpec(
        path=path,
        architecture=(config.architectures or [type(config).__name__.removesuffix("Config")])[0],
        model_type=text.model_type,
        num_layers=cast(int, facts["num_layers"]),
        hidden_size=hidden_size,
        intermediate_size=_first(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=_first(layer, "num_key_value_heads") or num_heads,
        head_dim=_first(layer, "head_dim") or hidden_size // num_heads,
        vocab_size=cast(int, facts["vocab_size"]),
        max_position_embeddings=_first(text, "max_position_embeddings", "max_seq_len", "seq_length") or 2048,
        rms_norm_eps=_first(text, "rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon") or 1e-6,
        rope_parameters=_rope_parameters(text),
        dtype=_stored_dtype(config, text),
        tie_word_embeddings=any(getattr(part, "tie_word_embeddings", False) for part in (config, text)),
        eos_token_ids=(),
        trust_remote_code=trust_remote_code,
        latent_sizes=_latent_sizes(text),
    )


def _read_json(file: Path, *, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TargetError(missing) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TargetError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TargetError(f"{file} holds a {type(content).__name__} where a JSON object belongs")
    return content


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these fields that is set; families name the same fact differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _latent_sizes(text: PreTrainedConfig) -> dict[str, int] | None:
    """DeepSeek-V2-Lite and others compress keys and values alone and state no rank of queries."""
    stated = {name: getattr(text, name, None) for name in LATENT_SIZES}
    return {name: size for name, size in stated.items() if size} if stated["kv_lora_rank"] else None


def _rope_parameters(text: PreTrainedConfig) -> dict[str, object]:
    """Rotary parameters in the form of transformers 5: `rope_type`, `rope_theta` and what the type adds.

    Older configurations (`rope_theta` beside `rope_scaling`, `type` for `rope_type`) are brought to it. Where every
    layer type has its own, those of full attention are given, since drafts attend fully. A target without rotary
    embedding gives Llama's default: its draft still rotates.
    """
    parameters = dict(_first(text, "rope_parameters", "rope_scaling") or {})
    of_layer_types = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if of_layer_types:
        parameters = dict(of_layer_types.get("full_attention") or next(iter(of_layer_types.values())))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.pop("type", None)
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = _first(text, "rope_theta") or 10000.0
    return parameters


def _stored_dtype(config: PreTrainedConfig, text: PreTrainedConfig) -> torch.dtype:
    """The configuration's dtype; float32, as transformers has it, when it names none."""
    named = _first(config, "dtype") or _first(text, "dtype")
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _eos_token_ids(
    path: Path, config: PreTrainedConfig, text: PreTrainedConfig, trust_remote_code: bool
) -> tuple[int, ...]:
    """Ids that end a turn, as `generate` takes them: generation_config.json, else config.json, else the tokenizer."""
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file, missing="") if generation_file.is_file() else {}
    for named in (generation.get("eos_token_id"), _first(config, "eos_token_id"), _first(text, "eos_token_id")):
        if named is not None:
            return tuple(named) if isinstance(named, (list, tuple)) else (int(named),)
    if not (path / "tokenizer_config.json").is_file():
        return ()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TargetError(
            f"{path} names no eos_token_id in generation_config.json or config.json, and its tokenizer, which may, "
            f"cannot be read: {error}"
        ) from error
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def running_dtype(configured: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision a target runs in: as configured; `auto` is as stored, but float32 on a CPU."""
    if configured != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[configured]
    return torch.float32 if device.type == "cpu" else stored
