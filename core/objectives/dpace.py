"""D-PACE: how much each slot of a drafted block weighs, by how likely decoding is to get there (2605.18810).

Shape letters: A blocks, K slots of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dpace_weights(cross_entropy_AK: Tensor, supervised_AK: Tensor, smoothing: float = 0.5) -> Tensor:
    """w_k = m_k sum_{j >= k} c_j m_j of each slot [A, K], a constant; in the cross-entropy's precision, fp32 at least.

    cross_entropy_AK    -log q of the token that came, in nats; what stands at an unsupervised slot is not looked at
    supervised_AK       m, bool
    smoothing           a in s_k = (1 - a) q_k + a with q_k = exp(-cross-entropy), which keeps later slots from
                        vanishing: 1 weighs by places alone, 0 by the bare product

    c_k = prod_{j <= k} s_j is the chance that the draft is right up to slot k, with s = 1 where nothing is supervised;
    so what a slot weighs is the accepted length that hangs on it. The loss is sum w_k CE_k / sum m_k: the weights do
    not enter its denominator.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be between 0 and 1, got {smoothing}")
    wide = torch.promote_types(cross_entropy_AK.dtype, torch.float32)
    cross_AK = cross_entropy_AK.detach().to(wide).masked_fill(~supervised_AK, 0.0)  # s = 1
    reached_AK = torch.exp(-cross_AK).mul_(1 - smoothing).add_(smoothing).cumprod(-1)
    taught_AK = reached_AK.masked_fill(~supervised_AK, 0.0)
    return taught_AK.flip(-1).cumsum(-1).flip(-1).masked_fill_(~supervised_AK, 0.0)
