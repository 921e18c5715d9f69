"""A target head made of given matrices: a real one, without a target directory behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchspec.core.models.target_head import SafetensorsTargetHead


@pytest.fixture
def make_head() -> Callable[..., SafetensorsTargetHead]:
    """make_head(vocabulary, hidden, scale=1.0, dtype=...): random rows, no final norm to apply."""

    def make(
        vocabulary: int, hidden: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
    ) -> SafetensorsTargetHead:
        generator = torch.Generator().manual_seed(vocabulary)
        rows_VH = (scale * torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)).to(dtype)
        return SafetensorsTargetHead(embedding_VH=rows_VH, head_VH=rows_VH, final_norm=nn.Identity())

    return make
