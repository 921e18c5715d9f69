"""How SGLang reads a Domino draft (`models/dflash.py`, `speculative/domino_utils.py`), in plain float64 torch: the
exporter's independent reader.

Shape letters: T context positions, K steps, L drafted tokens, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.algorithms.blocks.serving import Reader, check_names
from torchspec.core.errors import CheckpointError
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.target import TargetHead

OWN = ("prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight")
CONSTANT: dict[str, object] = {"projector_type": "domino", "pure_draft_prefix_len": 1}
"""What config.json says of every draft that is trained here: the first token is not corrected."""
SHIFT = "shift_label"
"""Whether each slot says the token behind its own place, the anchor's the first one: `sample_from_anchor` elsewhere."""


class DominoReader(Reader):
    def __init__(self, files: DraftFiles, head: TargetHead) -> None:
        super().__init__(files, head)
        self.from_anchor = bool(self.special[SHIFT])

    def corrected(self, states_KH: Tensor, anchor: Tensor, drafted_L: Tensor) -> Tensor:
        """Logits [L, N] of the drafted tokens, each given those before it."""
        reset_in, update_in, new_in = self.weight["prefix_gru.weight_ih_l0"].chunk(3)
        reset_state, update_state, new_state = self.weight["prefix_gru.weight_hh_l0"].chunk(3)
        state = states_KH.new_zeros(reset_state.shape[1])
        logits_KN, rows = self.logits(states_KH), []
        for step in range(len(drafted_L)):
            embedded = self.embedding_VH[int(anchor if step == 0 else drafted_L[step - 1])]
            reset = torch.sigmoid(reset_in @ embedded + reset_state @ state)
            update = torch.sigmoid(update_in @ embedded + update_state @ state)
            new = torch.tanh(new_in @ embedded + reset * (new_state @ state))
            state = (1 - update) * new + update * state
            added = self.weight["embed_proj.2"] @ F.silu(
                self.weight["embed_proj.0"] @ torch.cat((states_KH[step], state))
            )
            rows.append(logits_KN[step] + (added if step else 0))
        return torch.stack(rows)


def serve(files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor) -> Tensor:
    """Probabilities [L, V], float64, of each drafted token. See `Algorithm.serve`."""
    check_names(files, OWN)
    for name, wanted in CONSTANT.items():
        if files.config["dflash_config"].get(name) != wanted:
            raise CheckpointError(f"config.json of the draft: dflash_config.{name} must be {wanted!r}")
    if not isinstance(files.config["dflash_config"].get(SHIFT), bool):
        raise CheckpointError(f"config.json of the draft: dflash_config.{SHIFT} must be true or false")
    reader, anchor = DominoReader(files, head), next_tokens_T[-1]
    return reader.probabilities(reader.corrected(reader.states(taps_TNH, anchor), anchor, drafted_L))
