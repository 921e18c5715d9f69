"""A quantised target runs as one whose weights were never quantised: each is dequantised when transformers asks for it.

So no kernel of a quantised form is needed, on any device, and a target can be split over ranks. It takes the memory of
the unquantised one. Forms that torchspec does not read are left to transformers, where it has what they need.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from torchspec.backends.api import TargetError, TargetSpec
from torchspec.core.models.target_head import skeleton_of
from torchspec.core.models.target_quantisation import described, unread
from torchspec.core.models.target_spec import load_target_config
from torchspec.core.models.target_weights import TargetWeights

_KEY = "quantization_config"


@dataclass(frozen=True, kw_only=True)
class Dequantised:
    """A quantised weight, or its rows and columns [start, stop) alone, in place of the tensor that transformers loads;
    dequantised in `dtype`.

    transformers takes the slices of safetensors so, too: `[...]` gives the values.
    """

    weights: TargetWeights
    name: str
    dtype: torch.dtype
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def __getitem__(self, places: EllipsisType) -> Tensor:
        read = self.weights.read(self.name, dtype=self.dtype, device=torch.device("cpu"), rows=self.rows)
        return read if self.columns is None else read[:, slice(*self.columns)]


def examine(spec: TargetSpec) -> str | None:
    """How the engine computes with a quantised target (None: it is none); TargetError where it cannot."""
    if spec.quantisation is None or unread(spec.quantisation) is None:
        TargetWeights.open(spec.path).check_readable()
        return None if spec.quantisation is None else "the hf engine dequantises its weights when it loads them"
    _ask_transformers(spec)
    return "transformers runs it in its own way"


def load_dequantised(spec: TargetSpec, weights: TargetWeights, dtype: torch.dtype) -> Any:
    """The model on the CPU and what transformers found missing or misshapen, as `from_pretrained` gives them."""
    config = unquantised(load_target_config(spec.path, trust_remote_code=spec.trust_remote_code))
    tensors: dict[str, Any] = {name: Dequantised(weights=weights, name=name, dtype=dtype) for name in weights.quantised}
    opened: dict[Path, Any] = {}
    for name, file in weights.files.items():
        if name not in tensors:
            opened[file] = opened.get(file) or safe_open(file, framework="pt", device="cpu")
            tensors[name] = opened[file].get_slice(name)
    kind: Any = type(skeleton_of(config, spec.path, spec.trust_remote_code))
    return kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )


def unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says nothing of quantisation, so that transformers makes ordinary layers."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        if hasattr(part, _KEY):
            delattr(part, _KEY)
    return plain


def _ask_transformers(spec: TargetSpec) -> None:
    """TargetError when transformers says that it cannot run this quantisation here."""
    assert spec.quantisation is not None
    config = load_target_config(spec.path, trust_remote_code=spec.trust_remote_code)
    try:
        if getattr(config, _KEY, None) is None:
            raise ValueError(f"its config.json has no {_KEY}")
        quantizer = AutoHfQuantizer.from_config(getattr(config, _KEY), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # any library of any form may fail in any way
        reason = " ".join(str(error).split())
        raise TargetError(
            f"{spec.path} is quantised ({described(spec.quantisation)}), which the hf engine does not dequantise "
            f"({unread(spec.quantisation)}) and transformers cannot run here: {reason}. Use another backend, such as "
            "vllm or sglang, whose kernels may know it, or dequantise it first"
        ) from error
