"""torchspec trains draft models for speculative decoding, for any target, on any accelerator."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchspec.api import OnlineDraftTrainer, TargetTensors, load_config, train

__version__ = version("torchspec")
__all__ = ["OnlineDraftTrainer", "TargetTensors", "__version__", "load_config", "train"]


def __getattr__(name: str) -> object:
    """What is public, imported when first used: it brings torch with it."""
    if name != "__version__" and name in __all__:
        from torchspec import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
