"""Tensors of draft checkpoints that several algorithms share: read, and refused with one clear error each.

Shape letters: N draft vocabulary, V target vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchspec.core.errors import CheckpointError
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head


def read_vocabulary(tensors: Mapping[str, Tensor], draft_size: int, target_size: int) -> VocabularyMap:
    """The map that `d2t` says in offsets; without one the draft says every token. Raises CheckpointError."""
    if "d2t" not in tensors:
        if draft_size != target_size:
            raise CheckpointError("the draft vocabulary is pruned, but the checkpoint holds no `d2t` map")
        return VocabularyMap.identity(target_size)
    vocabulary = VocabularyMap.from_offsets(tensors["d2t"], target_size)
    size, ids_N = vocabulary.size, vocabulary.ids_N
    lowest, highest = int(ids_N.min()), int(ids_N.max())
    ascending = bool((ids_N[1:] > ids_N[:-1]).all())
    if size != draft_size or not ascending or lowest < 0 or highest >= target_size:
        raise CheckpointError(
            f"the vocabulary map `d2t` ({size} entries, ids {lowest}..{highest}) does not map "
            f"{draft_size} draft tokens into the target's {target_size}, ascending: it belongs "
            "to another tokenizer or is damaged"
        )
    return vocabulary


def check_embedding(stored_VH: Tensor, target: TargetSpec) -> None:
    """CheckpointError unless it is the target's embedding: many published drafts carry a copy of that, and a different
    one would be lost silently."""
    trusted = target.trust_remote_code
    head = load_target_head(target.path, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trusted)
    same_shape = stored_VH.shape == head.embedding_VH.shape
    if not same_shape or not torch.allclose(stored_VH.float(), head.embedding_VH, rtol=0, atol=1e-2):
        raise CheckpointError(
            f"the draft's embed_tokens {list(stored_VH.shape)} is not the embedding of {target.path}: it was made for "
            "another target, or trained its own, which a draft of the target's hidden size does not do here"
        )


def load_stored(draft: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors, by the draft's names, in float32. Raises CheckpointError unless they fit."""
    check_shapes(draft, state)
    draft.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})


def check_shapes(draft: nn.Module, state: Mapping[str, Tensor]) -> None:
    """CheckpointError with every tensor that is missing, has no use, is of another shape or is not finite."""
    expected = draft.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    parts = wrong + [f"{name} is missing" for name in missing] + [f"{name} has no use here" for name in extra]
    if parts:
        raise CheckpointError(f"the draft's tensors do not fit its config.json: {'; '.join(parts)}")
    damaged = [n for n, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if damaged:
        raise CheckpointError(f"not finite: {', '.join(damaged)}")
