"""The scheduler's side of a capture, on forward passes made by hand: several requests a pass, chunks, retractions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.backends.sglang.worker import plugin
from torchspec.backends.sglang.worker.capture import CaptureError, Collector
from torchspec.backends.sglang.worker.orders import Orders, request_id
from torchspec.core.errors import StoreFullError
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.features import Features, RecordRef

N, H = 2, 8


@dataclass
class Request:
    """The fields of SGLang's `Req` that matter, with their defaults."""

    rid: str
    origin_input_ids_unpadded: list[int]
    inflight_middle_chunks: int = 0
    is_retracted: bool = False
    retraction_count: int = 0
    hidden_states: list[list[float]] = field(default_factory=list)
    to_finish: object = None
    done: bool = False

    @property
    def origin_input_ids(self) -> list[int]:
        """As SGLang has them where images stand: by numbers of the images."""
        return [token + 1_000_000 for token in self.origin_input_ids_unpadded]

    def finished(self) -> bool:
        return self.done


@dataclass
class Prompt:
    request: Request
    taps_TNH: Tensor
    last_TH: Tensor


def prompt(name: str, length: int) -> Prompt:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 99, (length,), generator=generator).tolist()
    return Prompt(
        Request(request_id(name, 0), ids),
        torch.randn(length, N, H, generator=generator),
        torch.randn(length, H, generator=generator),
    )


Pass = list[tuple[Prompt, int, int]]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def hook(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> plugin.CaptureHook:
    made = plugin.CaptureHook(Orders(store="/nowhere", store_bytes=0, taps=(1, 3), cpu_chains=False))
    made._collector = Collector(store, (1, 3))
    monkeypatch.setattr(plugin, "_give_up", lambda request, reason: setattr(request, "to_finish", reason))
    return made


@pytest.fixture
def forward(hook: plugin.CaptureHook) -> Callable[[Pass], None]:
    """One forward pass over rows start to stop of each prompt, and what SGLang calls the hook with after it."""

    def run(rows: Pass) -> None:
        output = SimpleNamespace(
            hidden_states=torch.cat([p.taps_TNH[start:stop].flatten(1) for p, start, stop in rows]),
            last_hidden_states=torch.cat([p.last_TH[start:stop] for p, start, stop in rows]),
        )
        offset = 0
        for p, start, stop in rows:
            request = p.request
            request.inflight_middle_chunks = int(stop < len(request.origin_input_ids))
            whole = not (request.finished() or request.is_retracted or request.inflight_middle_chunks)
            offset = hook(
                _unexpected,
                None,
                req=request,
                logits_output=output,
                hidden_state_offset=offset,
                capture_hidden_mode=SimpleNamespace(is_full=lambda: True),
                extend_input_len=stop - start,
                store=whole,
            )
        assert offset == len(output.hidden_states)
        output.hidden_states.fill_(torch.nan)  # the engine uses its buffers again
        output.last_hidden_states.fill_(torch.nan)

    return run


def _unexpected(*_: Any, **__: Any) -> int:
    raise AssertionError("SGLang's own function was called")


class CopyingStore(MemoryStore):
    """A store of another process keeps no reference to what it was given."""

    def put(self, record_id: str, features: Features) -> RecordRef:
        copied = Features(
            input_ids_T=features.input_ids_T,
            taps_TNH=features.taps_TNH.clone(),
            last_TH=features.last_TH.clone(),
            tap_layers=features.tap_layers,
            norm_state=features.norm_state,
        )
        return super().put(record_id, copied)


@pytest.fixture
def copying(hook: plugin.CaptureHook) -> CopyingStore:
    store = CopyingStore()
    hook.collector.sink = store
    return store


def check(store: MemoryStore, name: str, p: Prompt) -> None:
    found = store.get(RecordRef(record_id=name, length=len(p.last_TH)))
    assert found.input_ids_T.tolist() == p.request.origin_input_ids_unpadded
    assert torch.equal(found.taps_TNH, p.taps_TNH)
    assert torch.equal(found.last_TH, p.last_TH)
    assert (found.tap_layers, found.norm_state) == ((1, 3), "post_norm")
    assert p.request.hidden_states == [[float(len(p.last_TH))]]
    assert p.request.to_finish is None
    assert not hasattr(p.request, "torchspec_parts")


def test_several_requests_in_one_pass(forward: Callable[[Pass], None], copying: CopyingStore) -> None:
    prompts = [prompt(name, length) for name, length in (("a", 5), ("b", 1), ("c", 9))]
    forward([(p, 0, len(p.last_TH)) for p in prompts])
    for name, p in zip("abc", prompts, strict=True):
        check(copying, name, p)


def test_chunks_beside_other_requests(forward: Callable[[Pass], None], copying: CopyingStore) -> None:
    long, first, second = prompt("long", 10), prompt("first", 3), prompt("second", 2)
    forward([(first, 0, 3), (long, 0, 4)])
    assert len(copying) == 1  # no half of a record
    forward([(long, 4, 8)])
    forward([(long, 8, 10), (second, 0, 2)])
    for name, p in (("long", long), ("first", first), ("second", second)):
        check(copying, name, p)


def test_a_retracted_request_starts_over(forward: Callable[[Pass], None], copying: CopyingStore) -> None:
    p = prompt("a", 8)
    forward([(p, 0, 3)])
    p.request.is_retracted, p.request.retraction_count = True, 1
    forward([(p, 3, 6)])  # was on its way when the request was retracted
    p.request.is_retracted = False
    forward([(p, 0, 5)])
    forward([(p, 5, 8)])
    check(copying, "a", p)


def test_retracted_between_two_passes(forward: Callable[[Pass], None], copying: CopyingStore) -> None:
    p = prompt("a", 8)
    forward([(p, 0, 3)])
    p.request.retraction_count = 1
    forward([(p, 0, 8)])
    check(copying, "a", p)


def test_an_aborted_request_leaves_nothing(forward: Callable[[Pass], None], copying: CopyingStore) -> None:
    p = prompt("a", 8)
    forward([(p, 0, 3)])
    p.request.done = True
    forward([(p, 3, 6)])
    assert not hasattr(p.request, "torchspec_parts")
    assert len(copying) == 0
    assert p.request.to_finish is None


def test_rows_from_a_cache_are_missed(forward: Callable[[Pass], None], store: MemoryStore) -> None:
    p = prompt("a", 8)
    forward([(p, 3, 8)])  # the first three were found in SGLang's cache
    assert p.request.to_finish == "SGLang returned 5 rows of taps and 5 of last hidden states for 8 tokens"
    assert p.request.hidden_states == []
    assert len(store) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["taps_TNH", "last_TH"])
def test_what_is_not_finite_is_refused(
    forward: Callable[[Pass], None], store: MemoryStore, bad: float, where: str
) -> None:
    p, good = prompt("a", 4), prompt("b", 3)
    getattr(p, where)[2, 0] = bad
    forward([(p, 0, 4), (good, 0, 3)])
    assert "of 1 tokens are not finite, the first 2" in str(p.request.to_finish)
    assert good.request.to_finish is None
    assert len(store) == 1


def test_a_store_that_refuses_gives_the_reason(forward: Callable[[Pass], None], hook: plugin.CaptureHook) -> None:
    class Full:
        def put(self, record_id: str, features: Features) -> RecordRef:
            raise StoreFullError("there is no room")

    hook.collector.sink = Full()
    p = prompt("a", 4)
    forward([(p, 0, 4)])
    assert p.request.to_finish == "there is no room"


def test_other_ranks_write_nothing_and_answer_alike(
    forward: Callable[[Pass], None], hook: plugin.CaptureHook, store: MemoryStore
) -> None:
    hook.collector.sink = None
    p = prompt("a", 6)
    forward([(p, 0, 3)])
    forward([(p, 3, 6)])
    assert len(store) == 0
    assert p.request.hidden_states == [[6.0]]


def test_requests_that_are_no_captures_are_sglangs(hook: plugin.CaptureHook) -> None:
    request = Request("somebody's", [1, 2])
    given: dict[str, Any] = {
        "req": request,
        "logits_output": None,
        "hidden_state_offset": 3,
        "capture_hidden_mode": None,
        "extend_input_len": 2,
        "store": True,
    }
    assert hook(lambda processor, **named: 5 if (processor, named) == ("it", given) else 0, "it", **given) == 5


def test_taps_come_in_the_order_asked_for() -> None:
    store, p = MemoryStore(), prompt("a", 4)
    collector = Collector(store, (7, 2))
    ascending = SimpleNamespace(hidden_states=p.taps_TNH.flatten(1), last_hidden_states=p.last_TH)
    collector.add(p.request, ascending, 0, 4, whole=True)
    collector.finish(p.request, "a")
    found = store.get(RecordRef(record_id="a", length=4))
    assert found.tap_layers == (7, 2)
    assert torch.equal(found.taps_TNH, p.taps_TNH[:, [1, 0]])


@pytest.mark.parametrize("missing", ["hidden_states", "last_hidden_states"])
def test_no_hidden_states_at_all(missing: str) -> None:
    p, collector = prompt("a", 4), Collector(MemoryStore(), (1, 2))
    output = SimpleNamespace(hidden_states=p.taps_TNH.flatten(1), last_hidden_states=p.last_TH)
    setattr(output, missing, None)
    collector.add(p.request, output, 0, 4, whole=True)
    with pytest.raises(CaptureError, match="returned no hidden states"):
        collector.finish(p.request, "a")


def test_another_number_of_taps_is_noticed() -> None:
    p = prompt("a", 4)
    collector = Collector(MemoryStore(), (1, 2, 3))
    output = SimpleNamespace(hidden_states=p.taps_TNH.flatten(1), last_hidden_states=p.last_TH)
    collector.add(p.request, output, 0, 4, whole=True)
    with pytest.raises(CaptureError, match="taps of width 16: 3 of 8 were asked for"):
        collector.finish(p.request, "a")
