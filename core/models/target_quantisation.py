"""How a target says that it is quantised, and what of that torchspec can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BITS = (2, 4, 8)
"""Of codes in words of 32 bits."""
SCALED = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors")
"""Values of `quant_method` that store codes of one byte and their scales."""
METHODS = (*SCALED, "gptq", "awq", "mxfp4")
"""Values of `quant_method` with forms that are read (`core.models.target_quantised`)."""

_DENSE = "dense"
_COMPRESSED = (_DENSE, "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")


def read_quantisation(path: Path) -> dict[str, Any] | None:
    """How the target in this directory is quantised: `quantization_config` of its config.json; None: it is not.

    Older compressed-tensors checkpoints call it `compression_config`; a multimodal one may have it with its language
    model; ModelOpt writes a file of its own. `quant_method` is always there.
    """
    config = _json(path / "config.json")
    beside = _json(path / "hf_quant_config.json").get("quantization")
    for part in (config, config.get("text_config") or {}):
        for key, method in (("quantization_config", "unnamed"), ("compression_config", "compressed-tensors")):
            if part.get(key):
                return {"quant_method": method, **part[key]}
    return {"quant_method": "modelopt", **beside} if beside else None


def unread(settings: Mapping[str, Any]) -> str | None:
    """What of this quantisation is not read here; None where all of it is."""
    method = settings["quant_method"]
    bits, form = settings.get("bits", settings.get("w_bit", 4)), settings.get("checkpoint_format", "gptq")
    version = str(settings.get("version", "gemm")).lower()
    if method not in METHODS:
        return f"quant_method {method}"
    if method == "modelopt" and settings.get("quant_algo") != "FP8":
        return f"quant_algo {settings.get('quant_algo')} of {method}"
    if method == "gptq" and (bits not in BITS or form not in ("gptq", "gptq_v2")):
        return f"gptq of {bits} bits in the form {form}"
    if method == "awq" and (bits != 4 or version != "gemm"):
        return f"awq of {bits} bits in version {version}"
    if method == "compressed-tensors":
        if settings.get("transform_config"):
            return "compressed-tensors with transforms (transform_config)"
        unknown = sorted(_formats(settings) - set(_COMPRESSED))
        if unknown:
            return f"compressed-tensors in the form {', '.join(unknown)}"
    return None


def described(settings: Mapping[str, Any]) -> str:
    """For people: the method, its form, bits and what shares a scale."""
    said = [str(settings["quant_method"])]
    if said[0] == "compressed-tensors":
        said.append(" and ".join(sorted(_formats(settings) - {_DENSE, "mixed-precision"})))
    weights: dict[str, Any] = next((group["weights"] for group in _groups(settings) if group.get("weights")), {})
    if bits := settings.get("bits", settings.get("w_bit", weights.get("num_bits"))):
        said.append(f"{bits} bits")
    if (size := settings.get("group_size", settings.get("q_group_size", weights.get("group_size")))) and size > 0:
        said.append(f"groups of {size}")
    if block := shared_block(settings):
        said.append(f"blocks of {block[0]} x {block[1]}")
    return ", ".join(part for part in said if part)


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = settings.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, dict)]


def _formats(settings: Mapping[str, Any]) -> set[str]:
    """Of compressed-tensors: as a whole, of each of its groups, and of what it makes sparse."""
    sparse = (settings.get("sparsity_config") or {}).get("format") or _DENSE
    stated = {settings.get("format"), sparse, *(group.get("format") for group in _groups(settings))}
    return {form for form in stated if form}


def shared_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: nothing is said, or several things."""
    weights = [group["weights"] for group in _groups(settings) if group.get("weights")]
    stated = [settings.get("weight_block_size"), *(entry.get("block_structure") for entry in weights)]
    found = {tuple(block) for block in stated if block}
    return next(iter(found)) if len(found) == 1 else None


def _json(file: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read: whoever needs it says so."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
