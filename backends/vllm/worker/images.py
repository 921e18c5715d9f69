"""Images of a prompt as vLLM takes them, where the ids have them already.

vLLM expands placeholders by itself: of a prompt of token ids it replaces the one id that stands for an image by as many
as the image takes, and hands the engine the result (`vllm.multimodal.processing.BaseMultiModalProcessor.apply`). The
trainer's processor has done that already, and its ids are those that count. So vLLM is given a prompt of nothing but
placeholders; what it makes of each image is then looked for in the trainer's ids, and the images are put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import ImageReference, Images
from torchspec.core.models.images import open_image

IMAGE = "image"
"""vLLM's name of the modality."""


def prompt_with_images(engine: Any, input_ids: Sequence[int], images: Images) -> Any:
    """A `vllm.inputs.MultiModalInput` of exactly these ids, for `LLMEngine.add_request`.

    Raises ImageError for images that cannot be used, TargetError where vLLM would put other tokens in their places.
    """
    from vllm.inputs import mm_input

    made = _made(engine, images)
    ranges = _placed(made["prompt_token_ids"], made["mm_placeholders"][IMAGE], list(input_ids))
    return mm_input(list(input_ids), made["mm_kwargs"], made["mm_hashes"], {IMAGE: ranges})


def ids_of(engine: Any, image: ImageReference) -> list[int]:
    """A prompt of this image alone, as vLLM has it."""
    return list(_made(engine, (image,))["prompt_token_ids"])


def _made(engine: Any, images: Images) -> Any:
    """What vLLM makes of the images in a prompt without text."""
    from vllm import TokensPrompt

    opened = [open_image(image) for image in images]
    processor = engine.renderer.get_mm_processor()
    text = processor.dummy_inputs.get_dummy_text({IMAGE: len(images)})
    prompt = TokensPrompt(
        prompt_token_ids=processor.info.get_tokenizer().encode(text, add_special_tokens=False),
        multi_modal_data={IMAGE: opened},
        # Of the bytes, which were checked: two images of the same tokens never share what is cached of them.
        multi_modal_uuids={IMAGE: [image.digest for image in images]},
    )
    # Else vLLM leaves out what it believes to have sent to its engine, and what is refused here never goes there.
    (made,) = engine.renderer.render_cmpl([prompt], skip_mm_cache=True)
    return made


def _placed(made_ids: Sequence[int], made: Sequence[Any], input_ids: list[int]) -> list[Any]:
    """The ranges of `made`, without what stands around their embeddings, in the ids. Text around an image may be
    tokenised together with its neighbours; what lies between its first and its last embedding is its own."""
    ranges, start, needed, image_ids = [], 0, 0, set()
    for number, each in enumerate(made, start=1):
        first, stop, is_embed = _core(each)
        wanted = list(made_ids[each.offset + first : each.offset + stop])
        own = [token for place, token in enumerate(wanted) if is_embed is None or bool(is_embed[place])]
        if len(set(own)) == 1:  # else some of them may stand in texts, too
            image_ids.add(own[0])
            needed += len(own)
        offset = _find(wanted, input_ids, start)
        if offset is None:
            raise TargetError(
                f"vLLM has {len(wanted)} tokens for image {number} of {len(made)}, and the prompt has none such behind "
                "the images before: it was tokenised by another processor than that of this target"
            )
        ranges.append(type(each)(offset=offset, length=len(wanted), is_embed=is_embed))
        start = offset + len(wanted)
    there = sum(token in image_ids for token in input_ids)
    if there != needed:
        raise TargetError(
            f"vLLM has {needed} tokens for {len(made)} images, the prompt has {there} for them: it was tokenised by "
            "another processor than that of this target"
        )
    return ranges


def _core(placed: Any) -> tuple[int, int, Any]:
    """From the first embedding of a range to behind its last, and which of the tokens between are embeddings."""
    if placed.is_embed is None:
        return 0, placed.length, None
    places = placed.is_embed.nonzero().flatten()
    first, stop = int(places[0]), int(places[-1]) + 1
    return first, stop, placed.is_embed[first:stop]


def _find(wanted: Sequence[int], ids: list[int], start: int) -> int | None:
    count = len(wanted)
    return next((place for place in range(start, len(ids) - count + 1) if ids[place : place + count] == wanted), None)
