"""Fine-tuning of a target's own multi-token-prediction head (FastMTP, 2509.18362), registered as `mtp`.

The head joins the target's last hidden state at t and the next token, runs one decoder layer, and predicts the token
after next; it is applied to its own output for the tokens that follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: MtpOptions, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.mtp.algorithm import Mtp

    return Mtp.create(options, target)


def _reads(config: dict[str, Any]) -> bool:
    ours = config.get("torchspec")
    return config.get("speculators_model_type") == "mtp" or (isinstance(ours, dict) and ours.get("algorithm") == "mtp")


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.mtp.convert import from_files

    return from_files(files, target)


SPEC = AlgorithmSpec(name="mtp", options=MtpOptions, create=_create, reads=_reads, from_files=_from_files)
