"""A multimodal target's processor: what an image becomes in the text, and in the inputs of the target.

The processor is transformers' own of the target's directory. Nothing is known here of any one family: which of its
outputs belong to tokens is told by their shapes.

Shape letters: T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import ImageReference
from torchspec.core.models.images import ImageError, open_image

_FILES = ("processor_config.json", "preprocessor_config.json")
NO_PROCESSOR = f"it has none of {', '.join(_FILES)}"
"""Why a target takes no images."""

_TEXT = ("input_ids", "attention_mask")
_IMAGE = 1
"""A token's kind where an image stands, as transformers numbers kinds (0 is text)."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where an image stands: characters [start, stop) of the text before, and [placed, placed_stop) after."""

    start: int
    stop: int
    placed: int
    placed_stop: int


class TargetProcessor:
    def __init__(self, path: Path, processor: Any) -> None:
        self.path = path
        self._processor = processor

    @classmethod
    def load(cls, path: Path, *, trust_remote_code: bool = False) -> TargetProcessor:
        """The processor in a target's directory, nothing else being consulted.

        Raises TargetError when there is none that takes images, or a library that it needs is missing.
        """
        if not takes_images(path):
            raise TargetError(f"the target {path} takes no images: {NO_PROCESSOR}")
        from transformers import AutoProcessor  # seconds, which processes without images do without

        try:
            processor: Any = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # any family's constructor may fail in any way
            raise TargetError(
                f"the processor of {path} cannot be loaded: {error}\n"
                "    remedy: processors of images need Pillow (pip install 'torchspec[images]'), those that also know "
                "videos need the torchvision that belongs to this torch"
            ) from error
        if not hasattr(processor, "image_processor") or getattr(processor, "image_token", None) is None:
            raise TargetError(f"the processor of {path}, {type(processor).__name__}, places no images in a text")
        return cls(path, processor)

    def expand(self, text: str, images: Sequence[ImageReference]) -> tuple[str, list[Placed]]:
        """The text with each image's placeholder replaced by the tokens that stand for the image, and where they are.

        Raises ImageError when there are not as many placeholders as images, or an image cannot be used.
        """
        found = self._run([text], images, return_text_replacement_offsets=True)
        offsets = found.get("text_replacement_offsets")
        if offsets is None:
            from transformers import __version__

            raise TargetError(
                f"{type(self._processor).__name__} of transformers {__version__} does not say where in a text it puts "
                "images: a newer release may"
            )
        if len(offsets[0]) != len(images):
            raise ImageError(f"the rendered conversation has {len(offsets[0])} places for {len(images)} images")
        pieces, placed, last = [], [], 0
        for each in offsets[0]:
            start, stop = each["span"]
            pieces += [text[last:start], each["replacement"]]
            placed.append(Placed(start=start, stop=stop, placed=each["new_span"][0], placed_stop=each["new_span"][1]))
            last = stop
        return "".join([*pieces, text[last:]]), placed

    def inputs(self, input_ids: Sequence[int], images: Sequence[ImageReference]) -> dict[str, Tensor]:
        """What the target is given beside the ids [1, T] of one sequence: pixels, their geometry, kinds of tokens.

        Raises ImageError when an image cannot be used or does not have as many tokens as stand for it in the ids.
        """
        found = self._run([self._processor.image_token * len(images)], images, return_tensors="pt")
        asked = found["input_ids"]
        kinds_1T = self._kinds([list(input_ids)])
        expected = int((self._kinds(asked.tolist()) == _IMAGE).sum())
        there = int((kinds_1T == _IMAGE).sum())
        if there != expected:
            raise ImageError(
                f"{len(images)} images take {expected} tokens, the sample has {there} for them: it was tokenised with "
                f"another processor than that of {self.path}"
            )
        return {
            name: kinds_1T if value.shape == asked.shape else value
            for name, value in found.items()
            if name not in _TEXT and isinstance(value, Tensor)
        }

    def ids_of(self, image: ImageReference) -> list[int]:
        """A prompt of this image alone. Raises ImageError as `inputs` does."""
        made = self._run([self._processor.image_token], [image], return_tensors="pt")
        ids: list[int] = made["input_ids"][0].tolist()
        return ids

    def image_end(self, input_ids: Sequence[int], images: Sequence[ImageReference]) -> int:
        """How many tokens of the sequence reach up to the end of its last image. Raises as `inputs` does."""
        self.inputs(input_ids, images)
        return int((self._kinds([list(input_ids)])[0] == _IMAGE).nonzero().max()) + 1

    def _kinds(self, input_ids: list[list[int]]) -> Tensor:
        return torch.tensor(self._processor.create_mm_token_type_ids(input_ids))

    def _run(self, text: list[str], images: Sequence[ImageReference], **options: Any) -> Any:
        opened = [open_image(image) for image in images]
        try:
            return self._processor(text=text, images=opened, **options)
        except (ValueError, TypeError, IndexError, StopIteration) as error:
            raise ImageError(f"{type(self._processor).__name__} refuses the images: {error}") from error


def takes_images(path: Path) -> bool:
    """Whether a target's directory has the files of a processor."""
    return any((path / name).is_file() for name in _FILES)


def processor_digest(path: Path) -> str | None:
    """sha256 of what decides how images are placed; None for a target that takes none."""
    files = [path / name for name in _FILES if (path / name).is_file()]
    content = b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest() if files else None
