"""The draft of an `OnlineDraftTrainer` in a published layout: written and checked, or as tensors to push."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.core import registry
from torchspec.core.errors import ConfigError, PeerError, Problem, TorchspecError
from torchspec.core.export.card import CardFacts
from torchspec.core.export.layout import FORMATS, ExportContext, stored_state, write_draft
from torchspec.core.export.selfcheck import Probe, SelfCheck
from torchspec.core.interfaces.algorithm import Algorithm, DraftFiles
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.core.models.target_tensors import copied_ends
from torchspec.core.parallel.ranks import GivenRanks


def layout_of(algorithm: Algorithm, format: str | None) -> str:
    """Of a format of the command line; None: the algorithm's own layout."""
    if format is None:
        return algorithm.layouts[0]
    if format not in FORMATS:
        raise ConfigError([Problem(field="format", value=format, message="no such format", choices=tuple(FORMATS))])
    return FORMATS[format]


def kept_in(dtype: torch.dtype) -> torch.dtype:
    """ConfigError for one that no weight can be kept in as it is."""
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if dtype not in allowed:
        choices = tuple(map(str, allowed))
        raise ConfigError([Problem(field="dtype", value=dtype, message="is no precision of weights", choices=choices)])
    return dtype


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A draft's unsharded state as it is to be exported. `target_changed`: its target is not what a directory holds."""

    algorithm: Algorithm
    state: Mapping[str, Tensor]
    layout: str
    dtype: torch.dtype
    target_changed: bool

    def files(self) -> DraftFiles:
        """Raises ConfigError where the layout cannot hold the draft, or would hold an older target's head."""
        files = self.algorithm.to_files(stored_state(self.state, self.dtype), self.layout)
        if self.target_changed and "lm_head.weight" in files.tensors and "lm_head.weight" not in self.state:
            message = "this layout holds a copy of the target's head, read from its directory: that is another by now"
            remedy = "train with the target's whole vocabulary (draft.vocab_size)"
            raise ConfigError([Problem(field="format", value=self.layout, message=message, remedy=remedy)])
        return files

    def write(
        self,
        directory: Path,
        vocabulary: VocabularyMap,
        ends: SafetensorsTargetHead,
        probe: Probe | None,
        card: CardFacts,
    ) -> SelfCheck:
        """See `export.layout.write_draft`; on the CPU, in float32."""
        self.files()
        head = copied_ends(ends, dtype=torch.float32, device=torch.device("cpu"))
        draft = self.algorithm.build_draft(vocabulary, head)
        draft.load_state_dict(dict(self.state))
        context = ExportContext(head=head, device=registry.load_device("cpu"), probe=probe, card=card)
        return write_draft(self.algorithm, draft, self.layout, directory, context, self.dtype)


def on_main(ranks: GivenRanks, work: Callable[[], SelfCheck]) -> SelfCheck:
    """What the first rank finds, on all of them; so is its failure."""
    found: dict[str, Any] = {}
    failure: TorchspecError | None = None
    if ranks.is_main:
        try:
            found["outcome"] = asdict(work())
        except TorchspecError as error:
            failure, found["failure"] = error, str(error)
    told = ranks.gather(found)[0]
    if failure is not None:
        raise failure
    if "failure" in told:
        raise PeerError(f"rank 0 failed: {told['failure']}")
    return SelfCheck(**told["outcome"])
