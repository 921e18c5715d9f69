"""How serving engines compute a multi-token-prediction head, in plain float64 torch: the exporter's independent reader.

It shares no code with the trained module and states the families' rules once more, as vLLM has them (`mimo_mtp.py`,
`deepseek_mtp.py`, `qwen3_next_mtp.py`): drafting more tokens than there are heads, the engine applies the one head
again, to its own output, a position further on; rotary positions are those of the slot's hidden state.

Shape letters: T prompt slots, L drafted tokens, H hidden size, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")

HEAD_ROWS = 8192
"""Rows of the target's head that are multiplied at a time."""


@dataclass(frozen=True)
class _Rules:
    """Stored names of the embedding's norm, the state's norm, the projection, the layer's prefix and the final norm;
    then what the projection reads first, which state the target hands over, what the next step reads, and whether the
    embedding at position 0 is zeroed."""

    token_norm: str
    state_norm: str
    proj: str
    layer: str
    norm: str
    first: str
    handed: str
    next: str
    zeroes: bool


def _rules(config: Mapping[str, Any], names: frozenset[str]) -> _Rules:
    nth = f"model.layers.{config.get('num_hidden_layers')}."
    known = (
        _Rules(
            "model.mtp_layers.0.token_layernorm.weight", "model.mtp_layers.0.hidden_layernorm.weight",
            "model.mtp_layers.0.input_proj.weight", "model.mtp_layers.0.", "model.mtp_layers.0.final_layernorm.weight",
            first="state", handed="before norm", next="normed", zeroes=True,
        ),
        _Rules(
            f"{nth}enorm.weight", f"{nth}hnorm.weight", f"{nth}eh_proj.weight", nth, f"{nth}shared_head.norm.weight",
            first="embedding", handed="after norm", next="as it is", zeroes=True,
        ),
        _Rules(
            "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.fc.weight", "mtp.layers.0.",
            "mtp.norm.weight", first="embedding", handed="after norm", next="normed", zeroes=False,
        ),
    )  # fmt: skip
    found = next((rules for rules in known if rules.proj in names), None)
    if found is None:
        looked = ", ".join(rules.proj for rules in known)
        raise CheckpointError(f"these are not the tensors of a multi-token-prediction head; looked for {looked}")
    return found


def check_names(files: DraftFiles) -> None:
    """Raise CheckpointError with every tensor an engine needs and misses, and every one it would ignore."""
    names = frozenset(files.tensors)
    rules = _rules(files.config, names)
    needed = {rules.token_norm, rules.state_norm, rules.proj, rules.norm, *(rules.layer + n for n in LAYER_TENSORS)}
    for optional in (HEAD_NORMS, BIASES):
        together = {rules.layer + name for name in optional}
        needed |= together if together & names else set()
    parts = [f"missing: {', '.join(sorted(needed - names))}"] if needed - names else []
    extra = sorted(names - needed)
    parts += [f"unknown, engines would skip or refuse them: {', '.join(extra)}"] if extra else []
    if parts:
        raise CheckpointError(f"these are not the tensors of a multi-token-prediction head; {'; '.join(parts)}")


def serve(files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor) -> Tensor:
    """Probabilities [L, V], float64, of each drafted token given those before it; see `Algorithm.serve`.

    The one tap is the last decoder layer's output.
    """
    check_names(files)
    reader = _Reader(files, head)
    handed_TH = taps_TNH[:, 0]
    if reader.rules.handed == "after norm":
        handed_TH = head.normed(handed_TH, "pre_norm")
    tokens, state_TH, start, rows = next_tokens_T, handed_TH.double(), 0, []
    for drafted in drafted_L:
        out_TH = reader.step(state_TH, tokens, start)
        normed_H = reader.norm(out_TH[-1], reader.rules.norm)
        rows.append(reader.probabilities(normed_H))
        state_TH = normed_H[None] if reader.rules.next == "normed" else out_TH[-1:]
        start += tokens.numel()
        tokens = drafted.reshape(1)
    return torch.stack(rows)


class _Reader:
    """One head with a growing key/value cache."""

    def __init__(self, files: DraftFiles, head: TargetHead) -> None:
        self.rules, self.head = _rules(files.config, frozenset(files.tensors)), head
        self.place = head.embedding_VH.device
        inner = {key: value for key, value in files.config.items() if key not in ("architectures", "model_type")}
        self.config = LlamaConfig(**inner)
        self.weight = {name: tensor.to(self.place).double() for name, tensor in files.tensors.items()}
        self.rotary = LlamaRotaryEmbedding(self.config).to(self.place)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight[name], self.config.rms_norm_eps)

    def step(self, state_TH: Tensor, tokens_T: Tensor, start: int) -> Tensor:
        """The layer's output before the final norm, [T, H]; appends to the cache."""
        rules = self.rules
        positions_T = torch.arange(start, start + tokens_T.numel(), device=self.place)
        embedded_TH = self.head.embedding_VH[tokens_T].double()
        if rules.zeroes:
            embedded_TH = torch.where(positions_T[:, None] == 0, 0.0, embedded_TH)
        embedded_TH, state_TH = self.norm(embedded_TH, rules.token_norm), self.norm(state_TH, rules.state_norm)
        both = (embedded_TH, state_TH) if rules.first == "embedding" else (state_TH, embedded_TH)
        x = torch.cat(both, dim=-1) @ self.weight[rules.proj].T
        x = x + self._attention(self.norm(x, f"{rules.layer}input_layernorm.weight"), positions_T)
        inner = self.norm(x, f"{rules.layer}post_attention_layernorm.weight")
        gate, up = (inner @ self.weight[f"{rules.layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (F.silu(gate) * up) @ self.weight[f"{rules.layer}mlp.down_proj.weight"].T

    def _heads(self, x_TH: Tensor, which: str) -> Tensor:
        """[1, heads, T, D] of q, k or v, with their bias and their norm where the head has them."""
        name = f"{self.rules.layer}self_attn.{which}"
        made = x_TH @ self.weight[f"{name}_proj.weight"].T + self.weight.get(f"{name}_proj.bias", 0.0)
        heads = made.view(len(x_TH), -1, self.config.head_dim or 0)
        if f"{name}_norm.weight" in self.weight:
            heads = self.norm(heads, f"{name}_norm.weight")
        return heads.transpose(0, 1)[None]

    def _attention(self, x_TH: Tensor, positions_T: Tensor) -> Tensor:
        q, k, v = (self._heads(x_TH, which) for which in "qkv")
        cos, sin = (table.double() for table in self.rotary(x_TH, positions_T[None]))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        self.keys.append(k)
        self.values.append(v)
        group = q.shape[1] // k.shape[1]
        keys = torch.cat(self.keys, dim=2).repeat_interleave(group, dim=1)
        values = torch.cat(self.values, dim=2).repeat_interleave(group, dim=1)
        scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        later = torch.arange(keys.shape[2], device=self.place)[None] > positions_T[:, None]
        out: Tensor = scores.masked_fill(later, float("-inf")).softmax(-1) @ values
        return out[0].transpose(0, 1).flatten(1) @ self.weight[f"{self.rules.layer}self_attn.o_proj.weight"].T

    def probabilities(self, normed_H: Tensor) -> Tensor:
        """Over the target's vocabulary, by its own head."""
        ids_V = torch.arange(self.config.vocab_size)
        logits = [self.head.rows(part).double() @ normed_H for part in torch.split(ids_V, HEAD_ROWS)]
        return torch.cat(logits).softmax(-1)
