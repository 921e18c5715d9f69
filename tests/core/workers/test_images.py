"""Images on their way to a worker: by reference, and refused by engines that take none."""

from __future__ import annotations

import itertools
import json

import pytest

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import CaptureRequest, ImageReference
from torchspec.core.workers.protocol import ProtocolError
from torchspec.core.workers.remote_engine import RemoteEngine
from torchspec.core.workers.requests import capture_request
from torchspec.core.workers.runner import refuse_images

SHOWN = (ImageReference(source="/a/b.png", digest="0" * 64), ImageReference(source="data:,x", digest="1" * 64))


def test_references_arrive_as_they_were_sent() -> None:
    engine = object.__new__(RemoteEngine)
    engine._prefix, engine._numbers = "p", itertools.count()
    for parts in ((), (((0, 1),), ((1, 3),))):
        sent = CaptureRequest(record_id="s", input_ids=[3, 4, 5], parts=parts, part=0, images=SHOWN)
        arrived = capture_request(json.loads(json.dumps(engine._sample(sent, 0))))
        assert (arrived.images, arrived.input_ids, arrived.parts) == (SHOWN, [3, 4, 5], parts)
    assert "images" not in engine._sample(CaptureRequest(record_id="s", input_ids=[3]), 0)
    with pytest.raises(ProtocolError, match="'digest'"):
        capture_request({"id": "s", "input_ids": [3], "images": [{"source": "/a"}]})


def test_an_engine_of_tokens_alone_names_the_sample() -> None:
    text = CaptureRequest(record_id="text", input_ids=[1])
    refuse_images("other", [text])
    with pytest.raises(TargetError, match="other captures no images, which sample 'shown' has"):
        refuse_images("other", [text, CaptureRequest(record_id="shown", input_ids=[1], images=SHOWN)])
