"""What is uploaded beside a pass is what was brought, whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor

from torchspec.core.errors import TargetError
from torchspec.core.features.conformance import sample_features
from torchspec.core.interfaces.device import Runtime
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.training.uploading import Found, Uploader


class Copying:
    """A device whose copies are there when they are waited for, and not before."""

    def __init__(self) -> None:
        self.uploaded = 0

    def upload(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        kept = [tensor.clone() for tensor in tensors]
        copies = [torch.full_like(tensor, float("nan")) for tensor in tensors]
        self.uploaded += len(copies)

        def wait() -> list[Tensor]:
            for copy, tensor in zip(copies, kept, strict=True):
                copy.copy_(tensor)
            return copies

        return wait


@pytest.fixture
def runtime() -> Copying:
    return Copying()


def uploaded(runtime: Copying, brought: Callable[[], Found]) -> Found:
    uploader = Uploader(cast(Runtime, runtime))
    try:
        return uploader.start(brought).result(30)()
    finally:
        uploader.close()


def test_features_of_every_document(runtime: Copying) -> None:
    features = {number: sample_features(number + 1, seed=number) for number in (0, 2, 5)}
    missing = Quarantined(record_id="1", reason="it was never there")
    found = uploaded(runtime, lambda: {**features, 1: missing})
    assert runtime.uploaded == 6
    assert found[1] is missing
    assert set(found) == {0, 1, 2, 5}
    for number, whole in features.items():
        got = found[number]
        assert isinstance(got, Features)
        assert torch.equal(got.taps_TNH, whole.taps_TNH)
        assert torch.equal(got.last_TH, whole.last_TH)
        assert got.input_ids_T is whole.input_ids_T
        assert (got.tap_layers, got.norm_state) == (whole.tap_layers, whole.norm_state)


def test_nothing_to_upload(runtime: Copying) -> None:
    assert uploaded(runtime, dict) == {}


def test_what_is_on_a_device_stays_there(runtime: Copying) -> None:
    there = sample_features()
    there = Features(**{**vars(there), "taps_TNH": there.taps_TNH.to("meta"), "last_TH": there.last_TH.to("meta")})
    assert uploaded(runtime, lambda: {0: there})[0] is there
    assert runtime.uploaded == 0


def test_why_nothing_was_brought_comes_through(runtime: Copying) -> None:
    def late() -> Found:
        raise TargetError("the features of step 3 did not come within 5 s")

    with pytest.raises(TargetError, match="of step 3 did not come"):
        uploaded(runtime, late)
