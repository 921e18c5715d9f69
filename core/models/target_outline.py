"""A target of which only the configuration is here: the shapes of its tensors, and how many bytes they are stored in.

For plans alone. Names and shapes are those of transformers' class, which holds experts of a layer as one tensor.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torchspec.core.models.target_head import skeleton_of
from torchspec.core.models.target_quantisation import SCALED, read_quantisation, shared_block
from torchspec.core.models.target_quantised import StoredTensor
from torchspec.core.models.target_spec import load_target_config
from torchspec.core.models.target_weights import INDEX_FILE, TargetWeights

MXFP4_BITS = 4 + 8 / 32
"""Codes of 4 bits, and a scale of 8 for 32 of them (OCP Microscaling Formats 1.0)."""
SCALE_BITS = 16
"""Of a group's scale in the forms with groups, which is bfloat16 or float16 there."""
_KEPT = re.compile(r"embed|lm_head|(^|\.)(gate|router|shared_expert_gate)\.|vision|multi_modal|mm_projector|\.bias$")
"""Tensors that checkpoints leave as they were whatever they say: no linear maps, routers, and what sees images."""


def only_outlined(path: Path) -> bool:
    """Whether a target's directory has a configuration and nothing that holds weights, nor is it a faulty download."""
    weights = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return (path / "config.json").is_file() and not any(any(path.glob(pattern)) for pattern in weights)


def outline(path: Path, *, trust_remote_code: bool = False) -> TargetWeights:
    """The target's tensors by shape; none of them can be read.

    Raises TargetError when transformers cannot build the target's class.
    """
    config = copy.deepcopy(load_target_config(path, trust_remote_code=trust_remote_code))
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model = skeleton_of(config, path, trust_remote_code)
    file = path / "config.json"
    stored = {
        name: StoredTensor(file=file, shape=tuple(parameter.shape), dtype="BF16")
        for name, parameter in model.named_parameters()
    }
    return TargetWeights(
        path=path, files=dict.fromkeys(stored, file), stored=stored, quantisation=read_quantisation(path)
    )


def stored_bytes(weights: TargetWeights, itemsize: int) -> int:
    """Of the target as its files hold it: counted where they are here, else as their index says, else worked out from
    `config.json`, tensors that are not quantised at `itemsize` bytes a value."""
    if not only_outlined(weights.path):
        return sum(tensor.nbytes for tensor in weights.stored.values())
    said = _total_size(weights.path / INDEX_FILE)
    if said is not None:
        return said
    bits = None if weights.quantisation is None else _bits(weights.quantisation)
    total = 0.0
    for name, tensor in weights.stored.items():
        narrow = bits is not None and len(tensor.shape) > 1 and not _is_kept(name, weights.quantisation or {})
        total += prod(tensor.shape) * ((bits or 0) / 8 if narrow else itemsize)
    return int(total)


def _total_size(index: Path) -> int | None:
    try:
        return int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _bits(quantisation: Mapping[str, Any]) -> float | None:
    """Of a quantised value with its share of the scales; None: nothing is said that is understood here."""
    if quantisation["quant_method"] == "mxfp4":
        return MXFP4_BITS
    groups = [group for group in (quantisation.get("config_groups") or {}).values() if isinstance(group, dict)]
    weights: Mapping[str, Any] = next((group["weights"] for group in groups if group.get("weights")), {})
    bits = quantisation.get("bits", quantisation.get("w_bit", weights.get("num_bits")))
    if bits is None:
        return 8 + 32 / prod(shared_block(quantisation) or (1 << 16,)) if _in_bytes(quantisation) else None
    group = quantisation.get("group_size", quantisation.get("q_group_size", weights.get("group_size"))) or 0
    return float(bits) + (SCALE_BITS / group if group > 0 else 0)


def _in_bytes(quantisation: Mapping[str, Any]) -> bool:
    return quantisation["quant_method"] in SCALED and quantisation.get("quant_algo", "FP8") == "FP8"


def _is_kept(name: str, quantisation: Mapping[str, Any]) -> bool:
    """Whether a tensor stays as it was: `*` in a listed name is anything, `re:` before one makes it a pattern."""
    listed = [*(quantisation.get("modules_to_not_convert") or ()), *(quantisation.get("ignore") or ())]
    patterns = (
        word.removeprefix("re:") if word.startswith("re:") else re.escape(word).replace(r"\*", ".*") for word in listed
    )
    return _KEPT.search(name) is not None or any(re.search(pattern, name) for pattern in patterns)
