"""Does an engine that reads these files predict what the trained draft predicts?

Good validation and no acceptance when served is the field's most common failure; its causes (tap ids, norm flags,
rope, vocabulary offsets, ignored tensors) all show here, before anything is served.

Shape letters: T prompt tokens, N taps, H target hidden size, L drafted tokens, V target vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from torchspec.core.errors import CheckpointError
from torchspec.core.interfaces.algorithm import Algorithm, DraftFiles
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.tensor_files import save_tensors

PROBE_TOKENS = 48
DRAFTED = 4
LIMIT = 1e-3
"""Largest total variation distance. Both sides compute with the same stored numbers, one in float32 and one in float64,
so whatever the stored precision, only float32's rounding lies between them."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A recorded piece of real target features: taps of T positions and the tokens that followed each."""

    taps_TNH: Tensor
    next_tokens_T: Tensor

    @classmethod
    def record(cls, features: Features) -> Probe:
        """From one captured sample of at least two tokens."""
        length = min(PROBE_TOKENS, features.input_ids_T.numel() - 1)
        return cls(
            taps_TNH=features.taps_TNH[:length].detach().float().cpu().contiguous(),
            next_tokens_T=features.input_ids_T[1 : length + 1].cpu().contiguous(),
        )

    @classmethod
    def synthetic(cls, taps: int, head: TargetHead) -> Probe:
        """Unit-scale random features, for drafts whose training left no probe."""
        generator = torch.Generator().manual_seed(0)
        vocabulary, hidden = head.embedding_VH.shape
        return cls(
            taps_TNH=torch.randn(PROBE_TOKENS, taps, hidden, generator=generator),
            next_tokens_T=torch.randint(0, vocabulary, (PROBE_TOKENS,), generator=generator),
        )

    def save(self, path: Path) -> None:
        save_tensors({"taps": self.taps_TNH, "next_tokens": self.next_tokens_T}, path)

    @classmethod
    def load(cls, path: Path) -> Probe:
        tensors = load_file(path)
        return cls(taps_TNH=tensors["taps"], next_tokens_T=tensors["next_tokens"])


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What was compared: the distributions of so many drafted tokens.

    total_variation   the largest distance between two of them: half the sum of the differences of all probabilities,
                      the probability of telling them apart, from 0 to 1 however many tokens share it
    """

    total_variation: float
    limit: float
    drafted: int
    recorded: bool


def check_files(
    algorithm: Algorithm,
    draft: nn.Module,
    files: DraftFiles,
    head: TargetHead,
    device: Device,
    probe: Probe | None,
) -> SelfCheck:
    """Draft from the trained module, then from the files through the algorithm's independent reader; compare.

    The module computes with its parameters as the files hold them: rounding is not what is looked for.
    Raises CheckpointError naming the difference and its likely causes.
    """
    probe_used = probe or Probe.synthetic(len(algorithm.taps), head)
    module = _as_stored(draft, files)
    place, dtype = head.embedding_VH.device, next(module.parameters()).dtype
    taps_TNH = probe_used.taps_TNH.to(place, dtype)
    next_tokens_T = probe_used.next_tokens_T.to(place)
    session = algorithm.drafter(module, head, device).open(1)
    generator = torch.Generator(device=place).manual_seed(0)
    proposal = session.propose([taps_TNH], [next_tokens_T], DRAFTED, temperature=1.0, generator=generator)
    assert proposal.probs_BLV is not None
    served_LV = algorithm.serve(files, head, taps_TNH, next_tokens_T, proposal.tokens_BL[0])
    differences_LV = (proposal.probs_BLV[0].double() - served_LV.to(place).double()).abs()
    worst = differences_LV.sum(-1).max().item() / 2
    if not worst <= LIMIT:
        raise CheckpointError(
            f"the exported draft does not predict what the trained one does: the total variation distance is "
            f"{worst:.3g} (limit {LIMIT:.0e}). Likely causes: norm flags, rope, vocabulary offsets, tensors exchanged"
        )
    drafted = proposal.tokens_BL.shape[1]
    return SelfCheck(total_variation=worst, limit=LIMIT, drafted=drafted, recorded=probe is not None)


def _as_stored(draft: nn.Module, files: DraftFiles) -> nn.Module:
    """`draft` in float32 with its parameters rounded to the precision of the files; itself where that is float32."""
    (stored,) = {tensor.dtype for tensor in files.tensors.values() if tensor.is_floating_point()}
    if stored == torch.float32 and next(draft.parameters()).dtype == torch.float32:
        return draft
    return deepcopy(draft).to(stored).float()
