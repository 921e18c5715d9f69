"""torchspec trains draft models for speculative decoding, for any target, on any accelerator."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchspec.api import load_config, train

__version__ = version("torchspec")
__all__ = ["__version__", "load_config", "train"]


def __getattr__(name: str) -> object:
    """The public functions, imported when first used: they bring torch with them."""
    if name in ("load_config", "train"):
        from torchspec import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
