"""The objective's terms written the plain way: the readable reference for `distillation`, and its oracle in tests.

p is the teacher over the draft vocabulary (normalised there), q = softmax of the draft's logits. Everything is in
the logits' own precision, which should be fp32 or fp64.

Shape letters: M rows, N draft vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_MN: Tensor, probs_MN: Tensor) -> Tensor:
    """-sum_v p log q of each row [M]; the loss of 2503.01840 with soft targets."""
    return -(probs_MN * logits_MN.log_softmax(-1)).sum(-1)


def entropy(probs_MN: Tensor) -> Tensor:
    """-sum_v p log p of each row [M], in nats; a token of probability 0 adds nothing."""
    return -probs_MN.xlogy(probs_MN).sum(-1)


def kl_divergence(logits_MN: Tensor, probs_MN: Tensor) -> Tensor:
    """KL(p | q) of each row [M]: the cross-entropy less what no draft can remove."""
    return cross_entropy(logits_MN, probs_MN) - entropy(probs_MN)


def reverse_kl(logits_MN: Tensor, log_probs_MN: Tensor) -> Tensor:
    """KL(q | p) = sum_v q (log q - log p) of each row [M]."""
    log_q_MN = logits_MN.log_softmax(-1)
    return (log_q_MN.exp() * (log_q_MN - log_probs_MN)).sum(-1)


def jensen_shannon(logits_MN: Tensor, log_probs_MN: Tensor) -> Tensor:
    """(KL(p | m) + KL(q | m)) / 2 with m = (p + q) / 2, of each row [M]; at most log 2."""
    log_q_MN = logits_MN.log_softmax(-1)
    log_m_MN = torch.logaddexp(log_probs_MN, log_q_MN) - math.log(2)
    from_p = (log_probs_MN.exp() * (log_probs_MN - log_m_MN)).sum(-1)
    from_q = (log_q_MN.exp() * (log_q_MN - log_m_MN)).sum(-1)
    return 0.5 * (from_p + from_q)


def acceptance(logits_MN: Tensor, probs_MN: Tensor, inside_M: Tensor) -> Tensor:
    """alpha = sum_v min(p_full, q) of each row [M]: the chance that a token drawn from q is accepted (2211.17192).

    `inside_M` is the target's mass on the draft vocabulary, so that p_full = inside * p there.
    """
    return (inside_M[:, None] * probs_MN).minimum(logits_MN.softmax(-1)).sum(-1)


def total_variation(logits_MN: Tensor, probs_MN: Tensor, inside_M: Tensor) -> Tensor:
    """1 - alpha of each row [M]; half the L1 distance of p and q only where the draft's vocabulary is whole."""
    return 1 - acceptance(logits_MN, probs_MN, inside_M)


def lk_alpha(logits_MN: Tensor, probs_MN: Tensor, inside_M: Tensor) -> Tensor:
    """-log alpha of each row [M] (2602.23881)."""
    return -acceptance(logits_MN, probs_MN, inside_M).log()


def label_cross_entropy(logits_MN: Tensor, index_M: Tensor) -> Tensor:
    """-log q[index] of each row [M]; 0 where the index is -1, a token that the draft cannot say."""
    return F.cross_entropy(logits_MN, index_M, ignore_index=-1, reduction="none")
