"""A loss of one's own: EAGLE-3 taught the Renyi divergence of order `order` from the target to the draft.

Only what differs from EAGLE-3 is here: an option and a term. The draft, its batches, decoding and files are EAGLE-3's,
and so an engine serves what this trains as any other EAGLE-3 draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import Field

from torchspec.core.algorithms.eagle3 import SPEC as EAGLE3
from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.objectives.own import distil_by


class RenyiOptions(Eagle3Options):
    order: float = Field(2.0, gt=1, description="of the divergence; near 1 it is KL(p | q)")


def renyi(logits_CN, probs_CN, order):
    """log sum_v p^order q^(1 - order) / (order - 1) of each row, [C] (Renyi 1961)."""
    log_q_CN = logits_CN.log_softmax(-1)
    log_p_CN = probs_CN.clamp_min(1e-30).log()
    return (order * log_p_CN + (1 - order) * log_q_CN).logsumexp(-1) / (order - 1)


@dataclass(frozen=True, kw_only=True)
class Renyi(Eagle3):
    name: str = "eagle3-renyi"

    def teach(self, outputs, output_head, supervision, ops):
        def term(logits_CN, probs_CN):
            return renyi(logits_CN, probs_CN, self.options.order)

        return distil_by(term, outputs, output_head, supervision, ops)


# A directory says nothing of what its draft was taught: eagle3 reads it, and this does not claim it.
SPEC = replace(EAGLE3, name="eagle3-renyi", options=RenyiOptions, create=Renyi.create, reads=lambda config: False)
