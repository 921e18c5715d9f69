"""The `draft` section of an EAGLE-3.1 run: EAGLE-3's, and which of the two norms the draft has."""

from __future__ import annotations

from pydantic import Field

from torchspec.core.algorithms.eagle3.options import Eagle3Options


class Eagle31Options(Eagle3Options):
    fc_norm: bool = Field(True, description="norm each tap, with a weight of its own, before fc")
    norm_before_fc: bool = Field(False, description="norm all taps together before fc, in place of fc_norm")
    norm_output: bool = Field(True, description="the next step's feature is the output after the final norm")
