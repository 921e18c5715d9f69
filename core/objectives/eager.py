"""The objective's terms written the plain way: the readable reference for `distillation`, and its oracle in tests.

p is the teacher over the draft vocabulary (normalised there), q = softmax of the draft's logits. Everything is in
the logits' own precision, which should be fp32 or fp64.

Shape letters: M rows, N draft vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def cross_entropy(logits_MN: Tensor, probs_MN: Tensor) -> Tensor:
    """-sum_v p log q of each row [M]; the loss of 2503.01840 with soft targets."""
    return -(probs_MN * logits_MN.log_softmax(-1)).sum(-1)


def entropy(probs_MN: Tensor) -> Tensor:
    """-sum_v p log p of each row [M], in nats; a token of probability 0 adds nothing."""
    return -probs_MN.xlogy(probs_MN).sum(-1)


def kl_divergence(logits_MN: Tensor, probs_MN: Tensor) -> Tensor:
    """KL(p | q) of each row [M]: the cross-entropy less what no draft can remove."""
    return cross_entropy(logits_MN, probs_MN) - entropy(probs_MN)


def acceptance(logits_MN: Tensor, probs_MN: Tensor, inside_M: Tensor) -> Tensor:
    """alpha = sum_v min(p_full, q) of each row [M]: the chance that a token drawn from q is accepted (2211.17192).

    `inside_M` is the target's mass on the draft vocabulary, so that p_full = inside * p there.
    """
    return (inside_M[:, None] * probs_MN).minimum(logits_MN.softmax(-1)).sum(-1)
