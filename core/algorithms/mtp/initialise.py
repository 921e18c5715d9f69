"""Where a head starts: from the target's checkpoint, or from random matrices.

Shape letters: H hidden size, V target vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.core.algorithms.mtp.model import MtpDraft
from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.models.target_weights import TargetWeights

COPY_ROWS = 8192
"""Rows of a copied embedding or head that are compared at a time."""


@torch.no_grad()
def start_from_target(draft: MtpDraft, head: TargetHead, target: TargetSpec) -> None:
    """In place, from the target's safetensors, in float32. Raises TargetError for a stored copy of the target's
    embedding or head that is none: engines would serve with it, and training does not know it."""
    if draft.norm.weight.is_meta:
        return  # a draft of shapes alone
    weights, family = TargetWeights.open(target.path), draft.geometry.rules
    host = torch.device("cpu")
    for name, parameter in draft.named_parameters():
        stored = family.stored(name, target.num_layers)
        parameter.copy_(weights.read(stored, dtype=torch.float32, device=host))
    prefix = family.prefix.format(n=target.num_layers)
    for name, what in family.copies.items():
        if prefix + name in weights.files:
            _check_copy(weights, prefix + name, head, what)


def _check_copy(weights: TargetWeights, name: str, head: TargetHead, what: str) -> None:
    vocabulary, size = head.embedding_VH.shape
    same = weights.shape(name) == (vocabulary, size)
    for start in range(0, vocabulary, COPY_ROWS) if same else ():
        rows = (start, min(start + COPY_ROWS, vocabulary))
        copied_XH = weights.read(name, dtype=head.embedding_VH.dtype, device=head.embedding_VH.device, rows=rows)
        theirs_XH: Tensor = head.embedding_VH[slice(*rows)] if what == "embedding" else head.rows(torch.arange(*rows))
        same = same and torch.equal(copied_XH, theirs_XH)
    if not same:
        raise TargetError(
            f"{weights.path}: {name} is not the target's {what}; a head with its own {what} is not supported"
        )


@torch.no_grad()
def start_anew(draft: MtpDraft, head: TargetHead) -> None:
    """In place, from torch's global random state; the final norm is the target's, since it stands before its head."""
    if draft.norm.weight.is_meta:
        return
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    # A norm of all ones is all ones, so the target's final norm answers with its weight.
    ones_1H = torch.full_like(head.embedding_VH[:1], 1.0)
    draft.norm.weight.copy_(head.normed(ones_1H, "pre_norm")[0])
