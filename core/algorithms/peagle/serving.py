"""How vLLM reads a P-EAGLE directory, in plain float64 torch: the exporter's independent reader.

It shares no code with the trained module. Rules followed (seen in vLLM's `llama_eagle3.py`, `speculators/algos.py` and
its parallel drafting): `d2t` holds offsets and `t2d` is ignored; layers are named `layers.N`, of which only the first
reads [embedding ; feature] and knows `norm_before_residual` (False where the config does not say); behind the newest
slot come L - 1 rows with `mask_token_id` and fc of `mask_hidden`, at the positions that follow; attention is causal
over all of them, and L consecutive rows from the newest slot on are sampled.

Shape letters: T prompt slots, L drafted tokens, R = T + L - 1 rows, H draft hidden size, N draft vocabulary, V target
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from torchspec.core.errors import CheckpointError
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.target import TargetHead

LAYER_TENSORS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
VOCABULARY_TENSORS = ("d2t", "t2d")


def check_names(files: DraftFiles) -> None:
    """Raise CheckpointError with every tensor vLLM needs and misses, and every one it would ignore or refuse."""
    layer = files.config.get("transformer_layer_config")
    layers = layer.get("num_hidden_layers", 1) if isinstance(layer, Mapping) else 1
    if type(layers) is not int or layers < 1:
        raise CheckpointError(f"config.json of the draft: num_hidden_layers is {layers!r}, not a number of layers")
    needed = {"fc.weight", "mask_hidden", "norm.weight", "lm_head.weight", "layers.0.hidden_norm.weight"}
    needed |= {f"layers.{number}.{name}" for number in range(layers) for name in LAYER_TENSORS}
    missing = sorted(needed - files.tensors.keys())
    ignored = sorted(files.tensors.keys() - needed - {*VOCABULARY_TENSORS, "embed_tokens.weight"})
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unknown, engines would skip or refuse them: {', '.join(ignored)}"] if ignored else []
    if parts:
        raise CheckpointError(f"these are not the tensors of a P-EAGLE draft of {layers} layers; {'; '.join(parts)}")


def _check_map(files: DraftFiles) -> None:
    """CheckpointError for a vocabulary map where vLLM has no place for one."""
    whole = int(files.config["transformer_layer_config"]["vocab_size"])
    held = [name for name in VOCABULARY_TENSORS if name in files.tensors]
    if held and files.tensors["lm_head.weight"].shape[0] == whole:
        raise CheckpointError(
            f"{' and '.join(held)}: the draft says all {whole} tokens of the target, and vLLM refuses to load a map of "
            "a vocabulary that is not pruned"
        )


def served_taps(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The target's layers (0-based) whose outputs vLLM hands to a draft with this config.

    It counts Hugging Face's hidden states, of which k is the output of layer k - 1; so does its default list.
    """
    listed = config.get("eagle_aux_hidden_state_layer_ids") or (2, num_layers // 2, num_layers - 3)
    return tuple(number - 1 for number in listed)


def serve(files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor) -> Tensor:
    """Probabilities [L, V], float64, of each drafted token; see `Algorithm.serve`. None depends on those before it."""
    check_names(files)
    _check_map(files)
    return _Reader(files, head.embedding_VH).probabilities(taps_TNH.flatten(1).double(), next_tokens_T, len(drafted_L))


class _Reader:
    """Causal decoder layers over slots and masks."""

    def __init__(self, files: DraftFiles, target_embedding_VH: Tensor) -> None:
        if "mask_token_id" not in files.config:
            raise CheckpointError("config.json of the draft has no mask_token_id: vLLM refuses to draft in parallel")
        self.mask_token = int(files.config["mask_token_id"])
        self.norm_before_residual = bool(files.config.get("norm_before_residual", False))
        inner = dict(files.config["transformer_layer_config"])
        inner.pop("architectures", None)
        self.config = LlamaConfig(**{key: value for key, value in inner.items() if key != "model_type"})
        place = target_embedding_VH.device
        self.weight = {
            name: tensor.to(place).double() for name, tensor in files.tensors.items() if tensor.is_floating_point()
        }
        self.embedding_VH = self.weight.get("embed_tokens.weight", target_embedding_VH)
        offsets = files.tensors.get("d2t")
        drafts = torch.arange(self.weight["lm_head.weight"].shape[0])
        self.ids_N = (drafts if offsets is None else drafts + offsets.cpu()).to(place)
        self.rotary = LlamaRotaryEmbedding(self.config).to(place)

    def probabilities(self, taps_TF: Tensor, tokens_T: Tensor, count: int) -> Tensor:
        """[L, V] over the whole target vocabulary; ids outside the draft vocabulary get zero."""
        slots, masks = len(taps_TF), count - 1
        taps_RF = torch.cat((taps_TF, self.weight["mask_hidden"].reshape(1, -1).expand(masks, -1)))
        tokens_R = torch.cat((tokens_T, tokens_T.new_full((masks,), self.mask_token)))
        x_RH = taps_RF @ self.weight["fc.weight"].T
        for number in range(self.config.num_hidden_layers):
            x_RH = self._layer(x_RH, tokens_R, number)
        logits_LN = self._norm(x_RH[slots - 1 :], "norm.weight") @ self.weight["lm_head.weight"].T
        whole_LV = logits_LN.new_zeros(count, self.config.vocab_size)
        return whole_LV.index_copy(1, self.ids_N, logits_LN.softmax(-1))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight[name], self.config.rms_norm_eps)

    def _layer(self, x_RH: Tensor, tokens_R: Tensor, number: int) -> Tensor:
        """Residual stream after a layer."""
        prefix = f"layers.{number}."
        if number == 0:
            normed = self._norm(x_RH, f"{prefix}hidden_norm.weight")
            embedded = self._norm(self.embedding_VH[tokens_R].double(), f"{prefix}input_layernorm.weight")
            read = torch.cat((embedded, normed), dim=-1)
            x_RH = normed if self.norm_before_residual else x_RH
        else:
            read = self._norm(x_RH, f"{prefix}input_layernorm.weight")
        x_RH = x_RH + self._attention(read, f"{prefix}self_attn.")
        inner = self._norm(x_RH, f"{prefix}post_attention_layernorm.weight")
        gate, up = (inner @ self.weight[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x_RH + (F.silu(gate) * up) @ self.weight[f"{prefix}mlp.down_proj.weight"].T

    def _attention(self, read: Tensor, prefix: str) -> Tensor:
        rows, size, kv_heads = len(read), self.config.head_dim, self.config.num_key_value_heads
        assert size is not None  # LlamaConfig fills both in
        assert kv_heads is not None
        q, k, v = (
            (read @ self.weight[f"{prefix}{name}_proj.weight"].T).view(rows, -1, size).transpose(0, 1)[None]
            for name in "qkv"
        )
        cos, sin = (table.double() for table in self.rotary(read, torch.arange(rows, device=read.device)[None]))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        group = self.config.num_attention_heads // kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        later = torch.ones(rows, rows, dtype=torch.bool, device=read.device).triu(1)
        out: Tensor = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(later, float("-inf")).softmax(-1) @ v
        return out[0].transpose(0, 1).flatten(1) @ self.weight[f"{prefix}o_proj.weight"].T
