"""The reference forms themselves, number by number: explicit sums over one tiny case."""

from __future__ import annotations

import math

import pytest
import torch

from torchspec.core.objectives import eager

LOGITS = [[0.3, -1.2, 2.0, 0.0], [-0.5, 0.9, 0.1, 4.0]]
PROBS = [[0.1, 0.2, 0.3, 0.4], [0.7, 0.05, 0.2, 0.05]]
INSIDE = [0.9, 0.35]
INDEX = [2, -1]


def by_hand(z: list[float], p: list[float], inside: float, label: int) -> dict[str, float]:
    """Every term of one row."""
    total = sum(math.exp(x) for x in z)
    q = [math.exp(x) / total for x in z]
    found = dict.fromkeys(("cross_entropy", "entropy", "kl", "reverse", "from_p", "from_q", "alpha"), 0.0)
    for p_v, q_v in zip(p, q, strict=True):
        m_v = (p_v + q_v) / 2
        found["cross_entropy"] -= p_v * math.log(q_v)
        found["entropy"] -= p_v * math.log(p_v)
        found["kl"] += p_v * math.log(p_v / q_v)
        found["reverse"] += q_v * math.log(q_v / p_v)
        found["from_p"] += p_v * math.log(p_v / m_v)
        found["from_q"] += q_v * math.log(q_v / m_v)
        found["alpha"] += min(inside * p_v, q_v)
    found["jsd"] = (found["from_p"] + found["from_q"]) / 2
    found["tv"], found["lk_alpha"] = 1 - found["alpha"], -math.log(found["alpha"])
    found["label"] = -math.log(q[label]) if label >= 0 else 0.0
    return found


def test_every_form_is_its_definition() -> None:
    logits, probs, inside = (torch.tensor(x, dtype=torch.float64) for x in (LOGITS, PROBS, INSIDE))
    forms = {
        "cross_entropy": eager.cross_entropy(logits, probs),
        "entropy": eager.entropy(probs),
        "kl": eager.kl_divergence(logits, probs),
        "reverse": eager.reverse_kl(logits, probs.log()),
        "jsd": eager.jensen_shannon(logits, probs.log()),
        "alpha": eager.acceptance(logits, probs, inside),
        "tv": eager.total_variation(logits, probs, inside),
        "lk_alpha": eager.lk_alpha(logits, probs, inside),
        "label": eager.label_cross_entropy(logits, torch.tensor(INDEX)),
    }
    wanted = [by_hand(*row) for row in zip(LOGITS, PROBS, INSIDE, INDEX, strict=True)]
    for name, form_M in forms.items():
        assert form_M.tolist() == pytest.approx([row[name] for row in wanted], rel=1e-14), name


def test_with_a_whole_vocabulary_total_variation_is_half_the_l1_distance() -> None:
    logits, probs = (torch.tensor(x, dtype=torch.float64) for x in (LOGITS, PROBS))
    half = 0.5 * (probs - logits.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(eager.total_variation(logits, probs, torch.ones(2)), half, rtol=1e-14, atol=0)
