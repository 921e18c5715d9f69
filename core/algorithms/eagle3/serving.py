"""How engines read an EAGLE-3 or EAGLE-3.1 directory, in plain float64 torch: the exporter's independent reader.

It shares no code with the trained module. Rules followed (seen in vLLM `llama_eagle3.py` and SGLang
`llama_eagle3.py`): `d2t` holds offsets; `t2d` is ignored; the plain layout names its layer `midlayer`, the
speculators layout `layers.0`; SGLang never applies `norm_before_residual` and skips names it does not know;
rotary positions are those of the slot's feature, one more for each drafted token; both read `fc_norm`,
`norm_before_fc` and `norm_output` from the top of the config, and what is missing is False.

Shape letters: T prompt slots, L drafted tokens, H draft hidden size, Z = 2H, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.algorithms.eagle3.serving_attention import GroupedServed, LatentServed, ServedAttention
from torchspec.core.errors import CheckpointError
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.target import TargetHead

LAYER_TENSORS = (
    "hidden_norm.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)

VOCABULARY_TENSORS = ("d2t", "t2d")


def layer_prefix(config: Mapping[str, Any]) -> str:
    return "layers.0." if is_speculators(config) else "midlayer."


def attention_reader(config: Mapping[str, Any]) -> type[ServedAttention]:
    """Of the layer that such a config has."""
    named = config.get("architectures") or ()
    return LatentServed if any("Deepseek" in name for name in named) else GroupedServed


def check_names(files: DraftFiles, num_taps: int) -> None:
    """Raise CheckpointError with every tensor an engine needs and misses, and every one it would ignore."""
    prefix = layer_prefix(files.config)
    own = (*LAYER_TENSORS, *(f"self_attn.{name}.weight" for name in attention_reader(files.config).tensors))
    needed = {"fc.weight", "norm.weight", "lm_head.weight", *(prefix + name for name in own)}
    needed |= {f"fc_norm.{place}.weight" for place in range(num_taps) if files.config.get("fc_norm")}
    needed |= {"input_norm.weight"} if files.config.get("norm_before_fc") else set()
    optional = {"d2t", "t2d", "embed_tokens.weight"}
    missing = sorted(needed - files.tensors.keys())
    ignored = sorted(files.tensors.keys() - needed - optional)
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unknown, engines would skip or refuse them: {', '.join(ignored)}"] if ignored else []
    if parts:
        layout = "speculators" if is_speculators(files.config) else "plain"
        raise CheckpointError(f"these are not the tensors of a {layout} EAGLE-3 draft; {'; '.join(parts)}")


def _check_map(files: DraftFiles) -> None:
    """CheckpointError for a vocabulary map where vLLM has no place for one."""
    config = files.config
    whole = int((config.get("transformer_layer_config") or config)["vocab_size"])
    held = [name for name in VOCABULARY_TENSORS if name in files.tensors]
    if held and files.tensors["lm_head.weight"].shape[0] == whole:
        raise CheckpointError(
            f"{' and '.join(held)}: the draft says all {whole} tokens of the target, and vLLM refuses to load a map of "
            "a vocabulary that is not pruned"
        )


def served_taps(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The target's layers (0-based) whose outputs an engine hands to a draft with this config.

    vLLM counts Hugging Face's hidden states, of which k is the output of layer k - 1; so does the default list that
    both engines fall back on. SGLang, which alone is meant by an explicit list in the plain layout, counts outputs.
    """
    if is_speculators(config):
        explicit, first = config.get("eagle_aux_hidden_state_layer_ids"), 1
    else:
        explicit, first = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"), 0
    if explicit is None:
        explicit, first = (2, num_layers // 2, num_layers - 3), 1
    return tuple(number - first for number in explicit)


def serve(files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor) -> Tensor:
    """Probabilities [L, V], float64, of each drafted token given those before it; see `Algorithm.serve`."""
    check_names(files, taps_TNH.shape[1])
    _check_map(files)
    reader = _Reader(files, head.embedding_VH)
    tokens, feature_TH = next_tokens_T, reader.feature(taps_TNH.double())
    start, rows = 0, []
    for drafted in drafted_L:
        out_TH = reader.layer(feature_TH, tokens, start)
        rows.append(reader.probabilities(out_TH[-1]))
        start += tokens.numel()
        tokens, feature_TH = drafted.reshape(1), reader.handed_on(out_TH[-1:])
    return torch.stack(rows)


class _Reader:
    """One decoder layer over [embedding ; feature] with a growing cache."""

    def __init__(self, files: DraftFiles, target_embedding_VH: Tensor) -> None:
        config = files.config
        inner = dict(config["transformer_layer_config"] if is_speculators(config) else config)
        default = is_speculators(config)
        self.norm_before_residual = bool(config.get("norm_before_residual", default)) if default else False
        self.fc_norm, self.norm_output = bool(config.get("fc_norm")), bool(config.get("norm_output"))
        self.norm_before_fc = bool(config.get("norm_before_fc"))
        self.eps, self.vocab_size = float(inner.get("rms_norm_eps", 1e-6)), int(inner["vocab_size"])
        prefix, place = layer_prefix(config), target_embedding_VH.device
        self.weight = {
            name.removeprefix(prefix): tensor.to(place).double()
            for name, tensor in files.tensors.items()
            if tensor.is_floating_point()
        }
        self.embedding_VH = self.weight.get("embed_tokens.weight", target_embedding_VH)
        offsets = files.tensors.get("d2t")
        drafts = torch.arange(self.weight["lm_head.weight"].shape[0])
        self.ids_N = (drafts if offsets is None else drafts + offsets.cpu()).to(place)
        own = "self_attn."
        weights = {name.removeprefix(own): each for name, each in self.weight.items() if name.startswith(own)}
        self.attention = attention_reader(config)(inner, weights, place)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight[name], self.eps)

    def feature(self, taps_TNH: Tensor) -> Tensor:
        """fc of the taps side by side, each of them or all together normed before where the config says so."""
        if self.norm_before_fc:
            return self._norm(taps_TNH.flatten(1), "input_norm.weight") @ self.weight["fc.weight"].T
        taps = list(taps_TNH.unbind(1))
        if self.fc_norm:
            taps = [self._norm(tap, f"fc_norm.{place}.weight") for place, tap in enumerate(taps)]
        return torch.cat(taps, dim=-1) @ self.weight["fc.weight"].T

    def handed_on(self, out_TH: Tensor) -> Tensor:
        """The next step's feature."""
        return self._norm(out_TH, "norm.weight") if self.norm_output else out_TH

    def layer(self, feature_TH: Tensor, tokens_T: Tensor, start: int) -> Tensor:
        """Residual stream after the layer, [T, H]; appends to the cache."""
        normed = self._norm(feature_TH, "hidden_norm.weight")
        residual = normed if self.norm_before_residual else feature_TH
        embedded = self.embedding_VH[tokens_T].double()
        both = torch.cat((self._norm(embedded, "input_layernorm.weight"), normed), dim=-1)
        x = residual + self.attention(both, start)
        inner = self._norm(x, "post_attention_layernorm.weight")
        gate, up = (inner @ self.weight[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (F.silu(gate) * up) @ self.weight["mlp.down_proj.weight"].T

    def probabilities(self, out_H: Tensor) -> Tensor:
        """Over the whole target vocabulary; ids outside the draft vocabulary get zero."""
        logits_N = self.weight["lm_head.weight"] @ self._norm(out_H, "norm.weight")
        whole_V = torch.zeros(self.vocab_size, dtype=torch.float64, device=out_H.device)
        return whole_V.index_copy(0, self.ids_N, logits_N.softmax(-1))
