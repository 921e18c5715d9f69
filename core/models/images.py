"""Images of conversations: where they are, and what is there. Local files and `data:` URIs; nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import hashlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import ImageReference

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 80


class ImageError(ValueError):
    """Why one image cannot be used."""


def image_source(url: str, directory: Path) -> str:
    """A `data:` URI as it is, a path or a `file:` URI as an absolute path; relative ones begin at `directory`.

    Raises ImageError for what would have to be fetched.
    """
    if url.startswith("data:"):
        return url
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme not in ("", "file"):
        raise ImageError(
            f"the image {shown(url)} would have to be fetched: images are read from files and data: URIs, nothing is "
            "downloaded"
        )
    path = Path(unquote(url.removeprefix("file://"))) if scheme else Path(url)
    return str((directory / path.expanduser()).absolute())


def refer_to_image(source: str) -> ImageReference:
    """The image at a source (see `image_source`), read once, for its digest. ImageError when it is not there."""
    return ImageReference(source=source, digest=hashlib.sha256(_read(source)).hexdigest())


def open_image(reference: ImageReference) -> Image:
    """The image as RGB. ImageError when it is not there, no image, or another one than was referred to."""
    pillow, content = _pillow(), _checked(reference)
    try:
        with pillow.open(BytesIO(content)) as image:
            opened: Image = image.convert("RGB")
            return opened
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ImageError(f"{shown(reference.source)} cannot be read as an image: {error}") from error


def embedded(reference: ImageReference) -> ImageReference:
    """The same image as a `data:` URI of its bytes: whoever is sent it opens no file. ImageError as of `open_image`."""
    if reference.source.startswith("data:"):
        return reference
    content = base64.b64encode(_checked(reference)).decode()
    return ImageReference(source=f"data:;base64,{content}", digest=reference.digest)


def plain_image(colour: tuple[int, int, int]) -> ImageReference:
    """One of a single colour (RGB), to try an engine with."""
    content = BytesIO()
    _pillow().new("RGB", (64, 48), colour).save(content, "PNG")
    return refer_to_image(f"data:;base64,{base64.b64encode(content.getvalue()).decode()}")


def shown(source: str) -> str:
    """A source in a message for people: the beginning of a `data:` URI is enough."""
    return source if len(source) <= _SHOWN or not source.startswith("data:") else f"{source[:_SHOWN]}..."


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise TargetError(f"images need Pillow: pip install 'torchspec[images]' ({error})") from error
    return Image


def _checked(reference: ImageReference) -> bytes:
    content = _read(reference.source)
    if hashlib.sha256(content).hexdigest() != reference.digest:
        raise ImageError(f"the image {shown(reference.source)} is another one than when it was tokenised")
    return content


def _read(source: str) -> bytes:
    try:
        if not source.startswith("data:"):
            return Path(source).read_bytes()
        header, comma, content = source.partition(",")
        if not comma:
            raise ValueError("it has no comma")
        return base64.b64decode(content, validate=True) if header.endswith(";base64") else unquote_to_bytes(content)
    except OSError as error:
        raise ImageError(f"the image {source} cannot be read: {error.strerror or error}") from error
    except (ValueError, binascii.Error) as error:
        raise ImageError(f"the image {shown(source)} is no data: URI that can be read: {error}") from error
