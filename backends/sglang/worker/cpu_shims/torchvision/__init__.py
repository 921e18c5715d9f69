"""SGLang and transformers import torchvision for images. Text alone needs none of it."""

from torchspec_absent import stand_in  # type: ignore[import-not-found]

__version__ = "0.0.0"
stand_in(__name__)
