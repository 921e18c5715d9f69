"""What the plug-in changes in SGLang's processes beside captures: where texts end, what is drawn, what is counted."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchspec.backends.sglang.worker import plugin
from torchspec.backends.sglang.worker.orders import Orders, orders, record_of, request_id


@pytest.mark.parametrize("record_id", ["plain", "with/slashes/in", ""])
def test_record_ids_travel_in_request_ids(record_id: str) -> None:
    assert record_of(request_id(record_id, 17)) == record_id
    assert request_id(record_id, 1) != request_id(record_id, 2)
    assert record_of(f"torchspec-write/3/{record_id}") is None


def test_orders_reach_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHSPEC_ORDERS", raising=False)
    assert orders() is None
    monkeypatch.setenv("TORCHSPEC_ORDERS", "")
    monkeypatch.setenv("SOME_VARIABLE", "the user's")
    monkeypatch.setenv("OTHER_VARIABLE", "")
    monkeypatch.delenv("OTHER_VARIABLE")
    given = Orders(store="/dev/shm/x", store_bytes=9, taps=(3, 1), cpu_chains=True)
    given.give({"SOME_VARIABLE": "set", "OTHER_VARIABLE": "set"})
    assert orders() == given
    assert (os.environ["SOME_VARIABLE"], os.environ["OTHER_VARIABLE"]) == ("the user's", "set")


def test_rounds_run_in_step_with_tokens() -> None:
    request = SimpleNamespace(customized_info=None, output_ids=[])
    tokens = request.output_ids
    tokens.append(1)  # of the prefill
    for accepted in (2, 0, 1):
        plugin.note_round(lambda *_: None, request, accepted)
        tokens += [0] * (accepted + 1)
    noted = request.customized_info[plugin.ACCEPTED]
    assert noted == [None, 2, None, None, 0, 1]
    assert len(tokens) == len(noted) + 1


def test_only_asked_tokens_end_a_text() -> None:
    request = SimpleNamespace(eos_token_ids={2})
    assert plugin.stop_where_asked(lambda req, new: req.eos_token_ids is None and new == [5], request, [5])
    assert request.eos_token_ids == {2}


@pytest.mark.parametrize("plain", [True, False])
def test_greedy_requests_do_not_change_what_others_draw(plain: bool) -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6]])
    drawn = torch.tensor([2, 2, 0], dtype=torch.int32)
    info = SimpleNamespace(top_ks=torch.tensor([1, 1 << 30, 1], dtype=torch.int32))
    expected = drawn if plain else torch.tensor([1, 2, 2], dtype=torch.int32)

    def from_probs(sampler: Any, probs: Any, info: Any, positions: Any, simple: bool) -> Any:
        assert (sampler, positions, simple) == ("sampler", "positions", True)
        return drawn, "capture"

    def from_logits(sampler: Any, logits: Any, info: Any, simple: bool, positions: Any) -> Any:
        assert (sampler, positions, simple) == ("sampler", "positions", True)
        return drawn

    tokens, capture = plugin.draw_alike(from_probs, "sampler", scores, info, "positions", plain)
    assert capture == "capture"
    for found in (tokens, plugin.draw_alike_from_logits(from_logits, "sampler", scores, info, plain, "positions")):
        assert found.dtype == torch.int32
        assert torch.equal(found, expected)


def test_every_request_has_its_own_seed() -> None:
    requests = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in (7, None, 2**62)]
    batch = SimpleNamespace(reqs=requests, device="cpu")
    info = plugin.seed_each(lambda *_: SimpleNamespace(sampling_seed=None), object, batch, 10)
    assert info.sampling_seed.tolist() == [7, 0, 2**62]
    theirs = SimpleNamespace(sampling_seed=torch.tensor([1, 2, 3]))
    assert plugin.seed_each(lambda *_: theirs, object, batch, 10).sampling_seed is theirs.sampling_seed
