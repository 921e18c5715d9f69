"""torchspec trains draft models for speculative decoding, for any target, on any accelerator."""

from importlib.metadata import version

__version__ = version("torchspec")
