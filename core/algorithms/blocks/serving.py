"""How serving engines read a draft of blocks, in plain float64 torch: the exporter's independent reader.

It shares no code with the trained module. Rules followed (seen in vLLM `qwen3_dflash.py` and SGLang `dflash.py`):
context keys and values come from norm(fc(taps)) through each layer's own maps; slots see the whole context within the
layer's window and all of their block, or, in sliding layers, its earlier slots alone; what a config says of causality
(`is_causal`, `dflash_config.causal`, of a speculators DFlash draft `sliding_window_non_causal`) holds for all layers;
rotary positions are those in the text; embedding and head are the target's where the files have none.

Shape letters: T context positions, Z slots of a block, K steps, L drafted tokens, H hidden size, N draft vocabulary,
V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from torchspec.core.errors import CheckpointError
from torchspec.core.export.draft_config import layer_config
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.target import TargetHead

LAYER_TENSORS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def check_names(files: DraftFiles, extra: Iterable[str] = ()) -> None:
    """Raise CheckpointError with every tensor an engine needs and misses, and every one it would ignore; `extra` are
    those of the algorithm's own."""
    layers = layer_config(files.config).get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise CheckpointError(f"config.json of the draft: num_hidden_layers must be a positive integer, got {layers!r}")
    needed = {"fc.weight", "hidden_norm.weight", "norm.weight", *extra}
    needed |= {f"layers.{layer}.{name}.weight" for layer in range(layers) for name in LAYER_TENSORS}
    optional = {"embed_tokens.weight", "lm_head.weight"}
    if is_speculators(files.config):
        optional |= {"d2t", "t2d"}
    missing = sorted(needed - files.tensors.keys())
    ignored = sorted(files.tensors.keys() - needed - optional)
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unknown, engines would skip or refuse them: {', '.join(ignored)}"] if ignored else []
    if parts:
        raise CheckpointError(f"these are not the tensors of the draft that config.json describes; {'; '.join(parts)}")


def served_taps(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The target's layers (0-based) whose outputs an engine hands to a draft with this config."""
    if is_speculators(config):
        return tuple(number - 1 for number in config["aux_hidden_state_layer_ids"])
    return tuple(config["dflash_config"]["target_layer_ids"])


class Reader:
    """A draft's files, and what an engine computes with them."""

    def __init__(self, files: DraftFiles, head: TargetHead) -> None:
        config = files.config
        self.files, self.head = files, head
        inner = dict(layer_config(config))
        inner.pop("architectures", None)
        self.config = Qwen3Config(**{key: value for key, value in inner.items() if key != "model_type"})
        self.special = config if is_speculators(config) else config["dflash_config"]
        self.block = int(config["block_size"])
        self.from_anchor = bool(config.get("sample_from_anchor", False))
        place = head.embedding_VH.device
        self.weight = {
            name.removesuffix(".weight"): tensor.to(place).double()
            for name, tensor in files.tensors.items()
            if tensor.is_floating_point()
        }
        self.embedding_VH = head.embedding_VH.double()
        offsets = files.tensors.get("d2t")
        self.ids_N = None
        if offsets is not None:
            self.ids_N = (torch.arange(len(offsets)) + offsets.cpu()).to(place)
        self.kinds, self.window = list(inner["layer_types"]), inner.get("sliding_window")
        self.rotary = Qwen3RotaryEmbedding(self.config).to(place)

    def states(self, taps_TNH: Tensor, anchor: Tensor) -> Tensor:
        """[K, H] after the final norm: of the slots that predict, for a block whose known token is `anchor`, behind T
        positions with these taps."""
        features_TH = self._norm(taps_TNH.flatten(1).double() @ self.weight["fc"].T, "hidden_norm")
        tokens_Z = torch.full((self.block,), int(self.special["mask_token_id"]), device=anchor.device)
        tokens_Z[0] = anchor
        x_ZH = self.embedding_VH[tokens_Z]
        for layer in range(self.config.num_hidden_layers):
            x_ZH = self._layer(x_ZH, features_TH, layer)
        return self._norm(x_ZH, "norm")[0 if self.from_anchor else 1 :]

    def logits(self, states_KH: Tensor) -> Tensor:
        """[K, N]."""
        rows_NH = self.weight.get("lm_head")
        return states_KH @ (self.head.head_VH.double() if rows_NH is None else rows_NH).T

    def probabilities(self, logits_LN: Tensor) -> Tensor:
        """[L, V]: over the whole target vocabulary; ids outside the draft vocabulary get zero."""
        if self.ids_N is None:
            return logits_LN.softmax(-1)
        whole_LV = logits_LN.new_zeros(len(logits_LN), self.config.vocab_size)
        return whole_LV.index_copy(1, self.ids_N, logits_LN.softmax(-1))

    def _layer(self, x_ZH: Tensor, features_TH: Tensor, layer: int) -> Tensor:
        name = f"layers.{layer}."
        normed_ZH = self._norm(x_ZH, name + "input_layernorm")
        both_SH = torch.cat((features_TH, normed_ZH))
        length, keys = len(features_TH), len(both_SH)
        query = self._heads(normed_ZH, name, "q", torch.arange(length, keys, device=x_ZH.device))
        key = self._heads(both_SH, name, "k", torch.arange(keys, device=x_ZH.device))
        value = self._heads(both_SH, name, "v", None)
        group = query.shape[0] // key.shape[0]
        scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * self._head_dim**-0.5
        scores = scores.masked_fill(~self._seen(layer, length, keys).to(scores.device), float("-inf"))
        mixed_ZHD = (scores.softmax(-1) @ value.repeat_interleave(group, 0)).transpose(0, 1)
        x_ZH = x_ZH + mixed_ZHD.flatten(1) @ self.weight[name + "self_attn.o_proj"].T
        inner = self._norm(x_ZH, name + "post_attention_layernorm")
        gate, up = (inner @ self.weight[f"{name}mlp.{part}_proj"].T for part in ("gate", "up"))
        return x_ZH + (F.silu(gate) * up) @ self.weight[name + "mlp.down_proj"].T

    def _seen(self, layer: int, length: int, keys: int) -> Tensor:
        """bool [Z, S]."""
        place_Z1, place_1S = torch.arange(length, keys)[:, None], torch.arange(keys)[None]
        seen = torch.ones(keys - length, keys, dtype=torch.bool)
        if self.kinds[layer] == "sliding_attention":
            seen &= place_1S > place_Z1 - int(self.window or 0)
        if self._causal(layer):
            seen &= place_1S <= place_Z1
        return seen

    def _causal(self, layer: int) -> bool:
        config = self.files.config
        told = layer_config(config).get("is_causal", self.special.get("causal"))
        if told is None and config.get("speculators_model_type") == "dflash":
            told = not config.get("sliding_window_non_causal", True)
        return bool(self.kinds[layer] == "sliding_attention" if told is None else told)

    def _heads(self, x_SH: Tensor, name: str, kind: str, positions: Tensor | None) -> Tensor:
        """[heads, S, D]: projected, and unless they are values normed and turned."""
        x_SHD = (x_SH @ self.weight[f"{name}self_attn.{kind}_proj"].T).view(len(x_SH), -1, self._head_dim)
        if positions is None:
            return x_SHD.transpose(0, 1)
        x_HSD = self._norm(x_SHD, f"{name}self_attn.{kind}_norm").transpose(0, 1)
        cos, sin = (table.double() for table in self.rotary(x_HSD[None], positions[None]))
        turned: Tensor = apply_rotary_pos_emb(x_HSD[None], x_HSD[None], cos, sin)[0][0]
        return turned

    @property
    def _head_dim(self) -> int:
        return int(self.config.head_dim)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scaled: Tensor = x * (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * self.weight[name]
        return scaled


def serve(files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor) -> Tensor:
    """Probabilities [L, V], float64, of each drafted token; they do not depend on each other. See `Algorithm.serve`."""
    check_names(files)
    reader = Reader(files, head)
    logits_KN = reader.logits(reader.states(taps_TNH, next_tokens_T[-1]))
    return reader.probabilities(logits_KN[: len(drafted_L)])
