"""The ends of a target, read straight from its safetensors: embedding, final norm and output head.

Shape letters: T rows, H target hidden size, V target vocabulary, N given rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.features import NormState
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.models.target_class import target_class
from torchspec.core.models.target_spec import load_target_config
from torchspec.core.models.target_weights import TargetWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Names that a checkpoint may use where the target's class in transformers says `lm_head`.
_HEAD_ALIASES = ("embed_out.weight", "output.weight")
_FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm", "norm_f")

# What configuration fields do to logits: (field, prefix of model_type) -> factor. The family belongs to the key
# because names mislead: Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it.
_LOGIT_FACTORS: dict[tuple[str, str], Callable[[float], float]] = {
    ("logits_scaling", "granite"): lambda value: 1.0 / value,
    ("logits_scaling", "hyperclovax"): lambda value: value,
    ("logit_scale", "cohere"): lambda value: value,
    ("lm_head_multiplier", "falcon_h1"): lambda value: value,
    ("logits_mup_width_multiplier", "inkling"): lambda value: 1.0 / value,
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

READ_ROWS = 8192
"""Rows of a divided head that are read at a time in search of given ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ends:
    """What whole and divided heads have in common."""

    embedding_VH: Tensor
    final_norm: nn.Module
    logit_factor: float = 1.0
    softcap: float | None = None

    def normed(self, last_TH: Tensor, state: NormState) -> Tensor:
        """The last hidden states after the final norm, in their own dtype; applied exactly when they are pre_norm."""
        if state == "post_norm":
            return last_TH
        if state != "pre_norm":
            raise ValueError(f"norm state must be pre_norm or post_norm, got {state!r}")
        normed: Tensor = self.final_norm(last_TH)
        return normed.to(last_TH.dtype)

    def finished(self, products: Tensor) -> Tensor:
        """See `TargetHead.finished`."""
        if self.logit_factor != 1.0:
            products = products * self.logit_factor
        if self.softcap is not None:
            products = torch.tanh(products / self.softcap) * self.softcap
        return products

    def _against(self, normed_TH: Tensor, rows_NH: Tensor) -> Tensor:
        logits = F.linear(normed_TH.to(rows_NH.dtype), rows_NH)
        return self.finished(logits.to(torch.promote_types(logits.dtype, torch.float32)))


@dataclass(frozen=True, kw_only=True, eq=False)
class SafetensorsTargetHead(_Ends):
    """Implements `interfaces.target.TargetHead`. A tied head is the embedding's own tensor, not a copy.

    logits = softcap * tanh(factor * (normed @ head^T) / softcap), without the cap where `softcap` is None.
    """

    head_VH: Tensor

    @property
    def shard_VH(self) -> Tensor:
        return self.head_VH

    @property
    def shards(self) -> VocabularyShards | None:
        return None

    def rows(self, ids_N: Tensor) -> Tensor:
        return self.head_VH[ids_N.to(self.head_VH.device)]

    def logits(self, normed_TH: Tensor, rows_NH: Tensor | None = None) -> Tensor:
        """[..., H] states -> [..., V] logits, or [..., N] against given rows; the product is in the head's dtype,
        everything after it, and the result, in float32 (float64 for a float64 head)."""
        return self._against(normed_TH, self.head_VH if rows_NH is None else rows_NH)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedTargetHead(_Ends):
    """`TargetHead` of which this process holds the rows `shards.bounds(rank)`; of a tied head they are a view of the
    embedding, which every rank has whole.

    weights, name    where the other rows are, on disk
    """

    shard_VH: Tensor
    shards: VocabularyShards
    weights: TargetWeights
    name: str

    @property
    def head_VH(self) -> NoReturn:
        raise AssertionError("no rank has the whole head: rows(ids) reads rows, shard_VH are this rank's")

    def rows(self, ids_N: Tensor) -> Tensor:
        """Read from the checkpoint again, block by block, so that no rank waits for another."""
        found_NH = self.shard_VH.new_empty(ids_N.numel(), self.shard_VH.shape[1])
        dtype, device = self.shard_VH.dtype, self.shard_VH.device
        for start in range(0, self.shards.target_size, READ_ROWS):
            place_M = ((ids_N >= start) & (ids_N < start + READ_ROWS)).nonzero()[:, 0]
            if place_M.numel():
                block = (start, min(start + READ_ROWS, self.shards.target_size))
                block_XH = self.weights.read(self.name, dtype=dtype, device=device, rows=block)
                found_NH[place_M.to(device)] = block_XH[(ids_N[place_M] - start).to(device)]
        return found_NH

    def logits(self, normed_TH: Tensor, rows_NH: Tensor | None = None) -> Tensor:
        """As `SafetensorsTargetHead.logits`, against given rows only."""
        assert rows_NH is not None, "no rank has the whole head: logits need rows"
        return self._against(normed_TH, rows_NH)


def load_target_head(
    path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> SafetensorsTargetHead:
    """Embedding, final norm and head of the target in `path`, frozen, in `dtype` on `device`.

    The final norm is the target's own module (RMS norm with weight or 1 + weight, LayerNorm, ...), and the tensors
    are looked for under the names the target's class gives them, whatever prefix the checkpoint puts before.
    Raises TargetError naming what was looked for when a tensor is missing, misshapen or quantised, and for a head
    that torchspec cannot reproduce (with a bias, or an unknown scaling of logits).
    """
    target = _Opened.of(path, trust_remote_code)
    embedding_VH = target.weights.read(target.embedding, dtype=dtype, device=device)
    return SafetensorsTargetHead(
        embedding_VH=embedding_VH,
        head_VH=embedding_VH if target.tied else target.weights.read(target.head, dtype=dtype, device=device),
        final_norm=_final_norm(target.skeleton, target.weights, dtype, device),
        logit_factor=logit_factor_of(target.text, path),
        softcap=softcap_of(target.text),
    )


def load_target_head_shard(
    path: Path,
    shards: VocabularyShards,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> ShardedTargetHead:
    """As `load_target_head`, with this rank's rows of the head alone; the others are not read."""
    target = _Opened.of(path, trust_remote_code)
    embedding_VH = target.weights.read(target.embedding, dtype=dtype, device=device)
    rows = shards.bounds(shards.rank)
    return ShardedTargetHead(
        embedding_VH=embedding_VH,
        shard_VH=embedding_VH[rows[0] : rows[1]]
        if target.tied
        else target.weights.read(target.head, dtype=dtype, device=device, rows=rows),
        final_norm=_final_norm(target.skeleton, target.weights, dtype, device),
        logit_factor=logit_factor_of(target.text, path),
        softcap=softcap_of(target.text),
        shards=shards,
        weights=target.weights,
        name=target.head,
    )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A target's class, its stored tensors, and the names of its ends among them."""

    skeleton: PreTrainedModel
    weights: TargetWeights
    embedding: str
    head: str
    text: PreTrainedConfig

    @classmethod
    def of(cls, path: Path, trust_remote_code: bool) -> _Opened:
        config = load_target_config(path, trust_remote_code=trust_remote_code)
        skeleton = skeleton_of(config, path, trust_remote_code)
        weights = TargetWeights.open(path)
        embedding, head = _find_ends(skeleton, weights, tied=is_tied(config))
        text = config.get_text_config(decoder=True)
        return cls(skeleton=skeleton, weights=weights, embedding=embedding, head=head, text=text)

    @property
    def tied(self) -> bool:
        return self.embedding == self.head


def skeleton_of(config: PreTrainedConfig, path: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The target's class without storage: it knows the names, the shapes and the kind of norm."""
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = target_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # any architecture's constructor may fail in any way
        raise TargetError(
            f"{path} (model_type {config.model_type!r}) is not a language model that transformers can build: {error}"
        ) from error
    return skeleton


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The stack of decoder layers with its final norm, inside whatever wraps it."""
    found: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    # transformers answers with the model itself where its own attribute names disagree, and a multimodal one with a
    # language model that has a head of its own (Llama 4).
    if found is not model and isinstance(getattr(found, "lm_head", None), nn.Module):
        return decoder_of(found)
    decoder = getattr(model, "model", model) if found is model else found
    assert isinstance(decoder, nn.Module)
    return decoder


def is_tied(config: PreTrainedConfig) -> bool:
    parts = (config, config.get_text_config(decoder=True))
    return any(getattr(part, "tie_word_embeddings", False) for part in parts)


def _find_ends(skeleton: PreTrainedModel, weights: TargetWeights, *, tied: bool) -> tuple[str, str]:
    """Stored names of the embedding and the head; of a tied pair, either or both may be stored."""
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding = skeleton.get_input_embeddings()
    head = skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise TargetError(f"{weights.path}: {type(skeleton).__name__} has no output head")
    if getattr(head, "bias", None) is not None:
        raise TargetError(
            f"{weights.path}: the output head of {type(skeleton).__name__} has a bias, which torchspec does not support"
        )
    embedding_name, head_name = names[id(embedding)] + ".weight", names[id(head)] + ".weight"
    embedding_shape = tuple(skeleton.get_parameter(embedding_name).shape)
    head_shape = tuple(skeleton.get_parameter(head_name).shape)
    stored_embedding = _find(weights, embedding_name, embedding_shape)
    aliases = (head_name, *_HEAD_ALIASES)
    stored_head = next((found for name in aliases if (found := _find(weights, name, head_shape))), None)
    if tied:
        stored_embedding, stored_head = stored_embedding or stored_head, stored_head or stored_embedding
    if stored_embedding is None:
        raise _not_found(weights, "embedding", embedding_name, embedding_shape)
    if stored_head is None:
        raise _not_found(weights, "output head (not tied, says config.json)", head_name, head_shape)
    return stored_embedding, stored_head


def _find(weights: TargetWeights, name: str, shape: tuple[int, ...]) -> str | None:
    """The stored name of a tensor that the target's class calls `name`; None when there is none of this shape.

    Checkpoints of wrapped and older models differ in what stands before the last module, so that is ignored when the
    full name is absent, except that of several the one with most of it in common is meant (a multimodal model has
    norms outside its language model); copies inside layers (multi-token prediction) are not.
    """
    if name in weights.files and weights.shape(name) == shape:
        return name
    tail = _tail(name)
    similar = [
        stored
        for stored in weights.files
        if (stored == tail or stored.endswith("." + tail))
        and _outside_layers(stored)
        and weights.shape(stored) == shape
    ]
    parts = set(name.split("."))
    common = {stored: len(parts.intersection(stored.split("."))) for stored in similar}
    nearest = [stored for stored in similar if common[stored] == max(common.values())]
    if len(nearest) > 1:
        raise TargetError(f"{weights.path}: {name} may be any of {', '.join(sorted(nearest))}")
    return nearest[0] if nearest else None


def _tail(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _outside_layers(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _not_found(weights: TargetWeights, what: str, name: str, shape: tuple[int, ...]) -> TargetError:
    outside = sorted(stored for stored in weights.files if _outside_layers(stored))
    listed = ", ".join(f"{stored} {list(weights.shape(stored))}" for stored in outside[:12]) or "none"
    return TargetError(
        f"{weights.path}: the target's {what} was not found. Looked for {name}, and for {_tail(name)} after any "
        f"prefix, of shape {list(shape)}. Tensors outside the layers: {listed}"
        f"{weights.why_not_found(_tail(name).rpartition('.')[0])}"
    )


def find_norm(model: PreTrainedModel) -> nn.Module | None:
    """The final norm behind the decoder's layers."""
    decoder = decoder_of(model)
    return next((found for name in _FINAL_NORMS if isinstance(found := getattr(decoder, name, None), nn.Module)), None)


def _final_norm(
    skeleton: PreTrainedModel, weights: TargetWeights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    norm = find_norm(skeleton)
    if norm is None:
        raise TargetError(
            f"{weights.path}: {type(decoder_of(skeleton)).__name__} has no final norm under the names "
            f"{', '.join(_FINAL_NORMS)}"
        )
    name = next(name for name, module in skeleton.named_modules() if module is norm)
    tensors = {}
    for key, expected in norm.state_dict().items():
        stored = _find(weights, f"{name}.{key}", tuple(expected.shape))
        if stored is None:
            raise _not_found(weights, "final norm", f"{name}.{key}", tuple(expected.shape))
        tensors[key] = weights.read(stored, dtype=dtype, device=device)
    norm.load_state_dict(tensors, assign=True)
    return norm.eval().requires_grad_(False)


def softcap_of(text: PreTrainedConfig) -> float | None:
    return next((cap for name in _SOFTCAPS if (cap := getattr(text, name, None)) is not None), None)


def logit_factor_of(text: PreTrainedConfig, path: Path) -> float:
    factor = 1.0
    for field in sorted({field for field, _ in _LOGIT_FACTORS}):
        value = getattr(text, field, None)
        if value is None or float(value) == 1.0:
            continue
        family = next((f for name, f in _LOGIT_FACTORS if name == field and text.model_type.startswith(f)), None)
        if family is None:
            raise TargetError(
                f"{path / 'config.json'}: {field}={value} of model_type {text.model_type!r} may change the target's "
                "logits in a way torchspec does not know"
            )
        factor *= _LOGIT_FACTORS[field, family](float(value))
    return factor
