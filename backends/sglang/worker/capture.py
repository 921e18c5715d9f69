"""From the chunks of a prefill to one record in the feature store. Runs in SGLang's scheduler; needs no SGLang.

Shape letters: t tokens of all requests of a forward pass, c of one request's chunk, T of its whole prompt; N taps,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from torchspec.core.interfaces.features import Features, FeatureSink

_PARTS = "torchspec_parts"


class Request(Protocol):
    """Of SGLang's `Req`, what is read here. Its other ids have a number of the image's where an image stands."""

    origin_input_ids_unpadded: Sequence[int]
    is_retracted: bool
    retraction_count: int

    def finished(self) -> bool: ...


class Output(Protocol):
    """Of SGLang's `LogitsProcessorOutput`: the tapped layers side by side in ascending order; after the final norm."""

    hidden_states: Tensor | None
    last_hidden_states: Tensor | None


@dataclass
class _Parts:
    """Of one request, on it: what SGLang drops, it drops with it. `retraction`: which attempt they are of."""

    retraction: int
    taps: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


class CaptureError(Exception):
    """Why there is no record; the text is for people."""


class Collector:
    """Puts a record into `sink` when a request's prefill is complete. `sink` None: another rank does."""

    def __init__(self, sink: FeatureSink | None, taps: Sequence[int]) -> None:
        self.sink, self.taps = sink, tuple(taps)
        ascending = sorted(taps)
        self._order = [ascending.index(tap) for tap in taps]

    def add(self, request: Request, output: Output, start: int, stop: int, *, whole: bool) -> None:
        """Rows start to stop of a forward pass are the request's next chunk. `whole`: and its last.

        They come to the host, where SGLang leaves some of them anyway, and those that have to wait are copied: the
        pass' output is big and may be overwritten. Problems wait for `finish`, since a request that this rank ended
        before its last chunk would go on at the others.
        """
        if self.sink is None or output.hidden_states is None or output.last_hidden_states is None:
            return
        parts: _Parts | None = getattr(request, _PARTS, None)
        if parts is None or parts.retraction != request.retraction_count:
            parts = _Parts(retraction=request.retraction_count)
            setattr(request, _PARTS, parts)
        for kept, rows in ((parts.taps, output.hidden_states), (parts.last, output.last_hidden_states)):
            kept.append(rows[start:stop].to("cpu", copy=not whole))

    def drop(self, request: Request) -> None:
        if hasattr(request, _PARTS):
            delattr(request, _PARTS)

    def finish(self, request: Request, record_id: str) -> None:
        """Store the record; CaptureError says why there is none. The request's parts are gone either way."""
        if self.sink is None:
            return
        parts: _Parts | None = getattr(request, _PARTS, None)
        if parts is None:
            raise CaptureError("SGLang returned no hidden states")
        self.drop(request)
        features = self._features(request, _joined(parts.taps), _joined(parts.last))
        try:
            self.sink.put(record_id, features)
        except Exception as error:  # whatever it is, it must reach the client and not end the scheduler
            raise CaptureError(str(error) or type(error).__name__) from error

    def _features(self, request: Request, taps_Tw: Tensor, last_TH: Tensor) -> Features:
        ids_T = torch.tensor(list(request.origin_input_ids_unpadded), dtype=torch.int64)
        if not len(ids_T) == len(taps_Tw) == len(last_TH):
            raise CaptureError(
                f"SGLang returned {len(taps_Tw)} rows of taps and {len(last_TH)} of last hidden states for "
                f"{len(ids_T)} tokens"
            )
        N, H = len(self.taps), last_TH.shape[1]
        if taps_Tw.shape[1] != N * H:
            raise CaptureError(f"SGLang returned taps of width {taps_Tw.shape[1]}: {N} of {H} were asked for")
        for name, rows in (("taps", taps_Tw), ("last hidden states", last_TH)):
            if not torch.isfinite(rows).all():
                bad_T = ~torch.isfinite(rows).all(1)
                raise CaptureError(f"the {name} of {int(bad_T.sum())} tokens are not finite, the first {_first(bad_T)}")
        taps_TNH = taps_Tw.view(-1, N, H)
        if self._order != sorted(self._order):
            taps_TNH = taps_TNH[:, self._order]
        return Features(
            input_ids_T=ids_T, taps_TNH=taps_TNH, last_TH=last_TH, tap_layers=self.taps, norm_state="post_norm"
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _first(bad_T: Tensor) -> int:
    return int(bad_T.nonzero()[0])
