"""Heads in the speculators layout (vllm-project/speculators, `models/mtp`), which are read and not written.

Its converter takes a head of Qwen's family out of a target's checkpoint under other names, as `convert/mtp` has them;
what the head computes stays that family's. Its heads over hybrid targets (Qwen3-Next, Qwen3.5) have gated attention and
norms of another kind, which are not trained here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchspec.core.algorithms.mtp.families import FAMILIES
from torchspec.core.algorithms.mtp.geometry import MODEL_TYPES
from torchspec.core.errors import CheckpointError
from torchspec.core.export.draft_config import layer_config
from torchspec.core.export.draft_tensors import check_embedding
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec

PREFIX = "mtp_layers.0."
FAMILY = FAMILIES["qwen"]
MODULES = {
    "token_layernorm": "token_norm",
    "hidden_layernorm": "hidden_norm",
    "input_proj": "input_proj",
    "final_layernorm": "norm",
}
"""Their names of what stands beside the decoder layer, and ours."""


def is_speculators_mtp(config: Mapping[str, Any]) -> bool:
    return bool(config.get("speculators_model_type") == "mtp")


def as_plain(files: DraftFiles, target: TargetSpec) -> DraftFiles:
    """The head under its family's own names; one that is there already as it is.

    Raises CheckpointError for a kind of layer that is not trained here, for several heads, and for an embedding that is
    not the target's; ValueError for a config without its layer's.
    """
    if not is_speculators_mtp(files.config):
        return files
    layer, heads = layer_config(files.config), files.config.get("num_nextn_predict_layers", 1)
    kind = layer.get("model_type", "qwen2")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json of the draft: its layer is that of {kind}, and mtp here knows dense layers with grouped "
            f"queries alone: {', '.join(MODEL_TYPES)}"
        )
    if heads != 1:
        raise CheckpointError(f"config.json of the draft: it has {heads!r} heads, and mtp here knows one")
    tensors = {}
    for name, tensor in files.tensors.items():
        if name == "embed_tokens.weight":
            check_embedding(tensor, target)
        else:
            tensors[_stored(name)] = tensor
    ours = {
        "algorithm": "mtp",
        "family": FAMILY.name,
        "target_layers": layer.get("num_hidden_layers", target.num_layers),
    }
    return replace(files, config={**layer, "torchspec": ours}, tensors=tensors)


def _stored(name: str) -> str:
    if not name.startswith(PREFIX):
        return name
    inner = name.removeprefix(PREFIX)
    module, _, rest = inner.partition(".")
    own = f"{MODULES[module]}.{rest}" if module in MODULES else f"layer.{inner}"
    return FAMILY.stored(own, 0)  # in this family's names layers are not counted
