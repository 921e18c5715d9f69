"""A target's ends from tensors that are here, of a model that somebody else holds and may go on training.

Shape letters: H target hidden size, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from torchspec.core.errors import TargetError
from torchspec.core.models.target_head import (
    SafetensorsTargetHead,
    find_norm,
    is_tied,
    logit_factor_of,
    skeleton_of,
    softcap_of,
)
from torchspec.core.ops.given import no_floats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TargetTensors:
    """A target as its configuration and the tensors that a draft's training reads of it, wherever they come from.

    embedding_VH  input embedding
    head_VH       rows of the output head; None: it is tied to the embedding
    norm          the final norm's state, by the names in its module ("weight", ...)
    path          directory for what names the target or reads more of it, if there is one
    """

    config: PreTrainedConfig
    embedding_VH: Tensor
    head_VH: Tensor | None
    norm: Mapping[str, Tensor]
    path: Path | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> TargetTensors:
        """Of a model of transformers; nothing is copied."""
        config = model.config
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
        found = find_norm(model)
        if head is None or found is None or getattr(head, "bias", None) is not None:
            raise TargetError(
                f"{type(model).__name__} has no output head without a bias after a final norm: torchspec needs both"
            )
        weight_VH = cast(Tensor, embedding.weight)
        stored = Path(config.name_or_path) if config.name_or_path else None
        return cls(
            config=config,
            embedding_VH=weight_VH,
            head_VH=None if head.weight is weight_VH else head.weight,
            norm=found.state_dict(),
            path=stored if stored is not None and stored.is_dir() else None,
        )


def make_target_head(target: TargetTensors, *, dtype: torch.dtype, device: torch.device) -> SafetensorsTargetHead:
    """Copies of the target's ends in `dtype` on `device`. Raises TargetError with every tensor that does not fit."""
    where = Path("target.config")
    skeleton = skeleton_of(target.config, where, trust_remote_code=False)
    text = target.config.get_text_config(decoder=True)
    shape = (text.vocab_size, text.hidden_size)
    norm = find_norm(skeleton)
    if norm is None:
        raise TargetError(f"{type(skeleton).__name__} has no final norm that torchspec knows")
    wanted = {"embedding": (target.embedding_VH, shape)}
    if target.head_VH is not None:
        wanted["head"] = (target.head_VH, shape)
    expected = norm.state_dict()
    wrong = [f"norm has {sorted(target.norm)}, not {sorted(expected)}"] if target.norm.keys() != expected.keys() else []
    wanted |= {f"norm {name}": (target.norm[name], tuple(t.shape)) for name, t in expected.items() if not wrong}
    wrong += misfits(wanted)
    if target.head_VH is None and not is_tied(target.config):
        wrong.append("head is missing, and the configuration does not tie it to the embedding")
    if wrong:
        raise TargetError("the target's tensors do not fit its configuration: " + "; ".join(wrong))

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=device, dtype=dtype, copy=True).contiguous()

    norm.load_state_dict({name: copied(tensor) for name, tensor in target.norm.items()}, assign=True)
    embedding_VH = copied(target.embedding_VH)
    return SafetensorsTargetHead(
        embedding_VH=embedding_VH,
        head_VH=embedding_VH if target.head_VH is None else copied(target.head_VH),
        final_norm=norm.eval().requires_grad_(False),
        logit_factor=logit_factor_of(text, where),
        softcap=softcap_of(text),
    )


def copied_ends(ends: SafetensorsTargetHead, *, dtype: torch.dtype, device: torch.device) -> SafetensorsTargetHead:
    """As they are now, elsewhere."""
    embedding_VH = ends.embedding_VH.to(device, dtype, copy=True)
    tied = ends.head_VH is ends.embedding_VH
    return replace(
        ends,
        embedding_VH=embedding_VH,
        head_VH=embedding_VH if tied else ends.head_VH.to(device, dtype, copy=True),
        final_norm=deepcopy(ends.final_norm).to(device, dtype),
    )


def misfits(wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> list[str]:
    """In words, which of these named tensors have another shape than they must, are no floats here or not finite."""
    found = []
    for name, (tensor, shape) in wanted.items():
        if (fault := no_floats(tensor)) is not None:
            found.append(f"{name}: {fault}")
        elif tuple(tensor.shape) != tuple(shape):
            found.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif not bool(torch.isfinite(tensor).all()):
            found.append(f"{name} is not finite")
    return found


def update_ends(
    ends: SafetensorsTargetHead,
    *,
    embedding_VH: Tensor | None = None,
    head_VH: Tensor | None = None,
    norm: Mapping[str, Tensor] | Tensor | None = None,
) -> None:
    """Write newer values into a head's own tensors; all of them or, with a TargetError, none.

    Of a tied pair either is enough; given both, they must be equal. A norm that is one tensor is its weight.
    """
    if norm is not None and not isinstance(norm, Mapping):
        norm = {"weight": norm}
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    if embedding_VH is not None:
        wanted["embedding"] = (embedding_VH, ends.embedding_VH)
    if head_VH is not None:
        wanted["head"] = (head_VH, ends.head_VH)
    own = ends.final_norm.state_dict()
    wrong = [f"norm has {sorted(norm)}, not {sorted(own)}"] if norm is not None and norm.keys() != own.keys() else []
    if norm is not None and not wrong:
        wanted |= {f"norm {name}": (norm[name], tensor) for name, tensor in own.items()}
    wrong += misfits({name: (new, tuple(old.shape)) for name, (new, old) in wanted.items()})
    tied = ends.embedding_VH is ends.head_VH
    if tied and embedding_VH is not None and head_VH is not None and not wrong:
        same = head_VH is embedding_VH or torch.equal(head_VH.detach().to(embedding_VH.device), embedding_VH.detach())
        wrong += [] if same else ["embedding and head differ, and this target's are one tensor"]
    if wrong:
        raise TargetError("the target was not updated: " + "; ".join(wrong))
    with torch.no_grad():
        for new, old in wanted.values():
            old.copy_(new.detach())
