"""Images of a prompt as SGLang takes them, where the ids have them already.

Given images, SGLang makes a text of the ids and new ids of that. Given what a processor makes of images, it leaves the
ids as they are (`BaseMultimodalProcessor.load_mm_data`; the format `processor_output` of its documentation). So the
target's processor runs here, and says first whether the ids have as many tokens as it gives the images.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import ImageReference, Images
from torchspec.core.models.images import ImageError
from torchspec.core.models.target_processor import TargetProcessor


class ImageInputs:
    """What stands beside the ids in a request. The processor is loaded with the first image."""

    def __init__(self, target: Path, *, trust_remote_code: bool) -> None:
        self._target, self._trusted = target, trust_remote_code
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")  # processors are not for several at a time

    async def of(self, input_ids: Sequence[int], images: Images) -> dict[str, Any]:
        """Keyword arguments of `sglang.Engine.async_generate`: none for a prompt without images.

        Raises TargetError for images that cannot be used, or that have another number of tokens in the ids.
        """
        if not images:
            return {}
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._made, list(input_ids), images)

    def ids_of(self, image: ImageReference) -> list[int]:
        """A prompt of this image alone."""
        return self._thread.submit(lambda: self._processor.ids_of(image)).result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _made(self, input_ids: list[int], images: Images) -> dict[str, Any]:
        try:
            made = self._processor.inputs(input_ids, images)
        except ImageError as error:
            raise TargetError(str(error)) from error
        return {"image_data": [{**made, "format": "processor_output"}]}

    @cached_property
    def _processor(self) -> TargetProcessor:
        return TargetProcessor.load(self._target, trust_remote_code=self._trusted)
