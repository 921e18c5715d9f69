"""What vendors state of common accelerators, for plans of machines that are not here (assets/accelerators.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Accelerator(BaseModel):
    """Peaks of one device. `bf16`, `fp8`: dense matrix products in 1e12 operations a second; `bandwidth` of its memory
    in 1e12 bytes a second; `memory` in 1e9 bytes; `source`: where its vendor says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bf16: float = Field(gt=0)
    fp8: float | None = Field(None, gt=0)
    bandwidth: float = Field(gt=0)
    memory: float = Field(gt=0)
    source: str


@cache
def accelerators() -> Mapping[str, Accelerator]:
    """By name."""
    text = (resources.files("torchspec") / "assets" / "accelerators.yaml").read_text(encoding="utf-8")
    return MappingProxyType({name: Accelerator(**facts) for name, facts in yaml.safe_load(text).items()})
