"""How slots that hold the mask token start out finding the tokens that are known.

Before any training a slot of masks has no reason to look at the one token it should, among hundreds of positions, and
what it learns is weighed down by that share. Embeddings of a trained target have a direction in common; a key that
reads it knows a token from what is no token.

Shape letters: V target vocabulary, H its hidden size, M some tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.interfaces.target import TargetHead

SAMPLED_TOKENS, RIDGE = 4, 1e-2
"""Tokens per hidden unit that the direction is made of; its regularisation over the mean variance."""

TOLD = 0.9
"""Share of the tokens that a direction must find on its side."""


def normed_embeddings(head: TargetHead) -> Tensor:
    """[M, H] of tokens evenly over the vocabulary, float32 on the host, each of root mean square 1."""
    embedding_VH = head.embedding_VH
    size = embedding_VH.shape[1]
    step = max(1, embedding_VH.shape[0] // (SAMPLED_TOKENS * size))
    return _normed(embedding_VH[::step])


def normed_mask(head: TargetHead, mask_token: int) -> Tensor:
    """[H] likewise."""
    return _normed(head.embedding_VH[mask_token])


def token_direction(tokens_MH: Tensor, mask_H: Tensor) -> Tensor | None:
    """w [H] with w . mask = 0 and, on average over the tokens, w . token = 1; None where fewer than `TOLD` of them have
    w . token > 0.

    Fisher's linear discriminant of tokens from zero, mean over spread, among the directions that the mask has none of.
    """
    spread_HH = torch.cov(tokens_MH.T)
    spread_HH.diagonal().add_(RIDGE * spread_HH.diagonal().mean())
    mean_H, across_H = torch.linalg.solve(spread_HH, torch.stack((tokens_MH.mean(0), mask_H), dim=1)).T
    direction_H: Tensor = mean_H - across_H * (mean_H @ mask_H) / (across_H @ mask_H)
    along_M = tokens_MH @ direction_H
    if float((along_M > 0).float().mean()) < TOLD:
        return None
    return direction_H / along_M.mean()


def slow_direction(width: int) -> Tensor:
    """A random vector [D] of root mean square 1, of that half of the dimensions that rotary positions turn least, where
    halves turn together."""
    place_D = torch.arange(width) % (width // 2)
    drawn_D = torch.randn(width).sign() * (place_D >= width // 4)
    scaled_D: Tensor = drawn_D * width**0.5 / drawn_D.norm()
    return scaled_D


def _normed(embedding: Tensor) -> Tensor:
    return F.rms_norm(embedding.float().cpu(), embedding.shape[-1:])
