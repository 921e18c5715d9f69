"""Whether an engine takes images, found out when it starts: two of them go through the whole road and must differ."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.engine import CaptureRequest, ImageReference
from torchspec.core.models.images import plain_image
from torchspec.core.models.target_processor import NO_PROCESSOR, takes_images
from torchspec.core.workers.runner import Ask, Runner, WorkerSettings

log = logging.getLogger(__name__)

_COLOURS = ((90, 140, 200), (200, 60, 30))


def images_refused(
    runner: Runner, settings: WorkerSettings, ids_of: Callable[[ImageReference], Sequence[int]], seconds: float
) -> str | None:
    """Why images cannot be taken, for `Facts.no_images`; None where they can.

    `ids_of`: a prompt with that image, as the engine's own processor has it. An engine that leaves images out, or that
    takes what it remembers of one for another of the same tokens, gives both the same hidden states. One that captures
    nothing is asked for a token behind each. `seconds` that each may take.
    """
    if not takes_images(settings.target):
        return NO_PROCESSOR
    try:
        images = [plain_image(colour) for colour in _COLOURS]
        if settings.taps and settings.store is not None:
            states = [_states(runner, settings.store, ids_of(image), image, seconds) for image in images]
            if torch.equal(*states):
                return "it gives two images of the same tokens the same hidden states"
        else:
            for image in images:
                ask = Ask(input_ids=ids_of(image), max_new_tokens=1, temperature=0.0, seed=0, stop=(), images=(image,))
                runner.write([ask])[0].result(seconds)
    except Exception as error:  # of models and processors of any kind, in engines of any kind
        log.warning("no images of %s: %s", settings.target, error, exc_info=True)
        return str(error) or type(error).__name__
    return None


def _states(runner: Runner, place: Path, ids: Sequence[int], image: ImageReference, seconds: float) -> Tensor:
    """Last hidden states [T, H] of a prompt with the image."""
    record_id = f"image-proof-{image.digest[:8]}"
    runner.capture([CaptureRequest(record_id=record_id, input_ids=ids, images=(image,))])[0].result(seconds)
    store = SharedMemoryStore(root=place)
    try:
        ref = store.find(record_id)
        states_TH = store.get(ref).last_TH.clone()
        store.remove(ref)
        return states_TH
    finally:
        store.close()
