"""Captured features against transformers' own `hidden_states` of each sequence alone.

Tolerance 2e-5 absolute in float32: activations are of order 1 to 10, and a batch of another shape sums in another
order; the planted defects (tap shifted by one layer, norm forgotten or doubled) differ by 0.1 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from torchspec.backends.api import CaptureRequest, Features, Quarantined, RecordRef
from torchspec.backends.hf.engine import HfEngine
from torchspec.core.errors import ConfigError
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.models.target_head import load_target_head

ATOL = 2e-5
LENGTHS = (11, 3, 1, 8)


def sequences(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def captured(engine: HfEngine, batch: list[list[int]], taps: tuple[int, ...]) -> list[Features]:
    sink = MemoryStore()
    requests = [CaptureRequest(record_id=f"s{i}", input_ids=ids) for i, ids in enumerate(batch)]
    refs = engine.capture(requests, taps, sink)
    assert [ref.record_id for ref in refs] == [request.record_id for request in requests]
    assert [ref.length for ref in refs] == [len(ids) for ids in batch]
    return [take(sink, ref) for ref in refs]


def reference(path: Path, ids: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """transformers' hidden_states (embedding, then every layer, the last one normed) and logits of one sequence."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    return tuple(hidden[0] for hidden in output.hidden_states), output.logits[0]


@pytest.mark.parametrize("name", ["tiny_target", "tiny_llama"])
def test_taps_are_hidden_states_shifted_by_one(
    name: str, request: pytest.FixtureRequest, load_hf: Callable[..., HfEngine]
) -> None:
    path = request.getfixturevalue(name)
    engine, taps = load_hf(path), (1, 3, 4, 0)
    for ids, features in zip(sequences(), captured(engine, sequences(), taps), strict=True):
        hidden, _ = reference(path, ids)
        assert features.tap_layers == taps
        assert features.input_ids_T.tolist() == ids
        for column, tap in enumerate(taps):
            torch.testing.assert_close(features.taps_TNH[:, column], hidden[tap + 1], atol=ATOL, rtol=0)
        assert features.norm_state == "post_norm"
        torch.testing.assert_close(features.last_TH, hidden[-1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["tiny_target", "tiny_llama"])
def test_last_layer_tap_is_before_the_final_norm(
    name: str, request: pytest.FixtureRequest, load_hf: Callable[..., HfEngine]
) -> None:
    """hidden_states[n] has the norm; tap n - 1 must not, and becomes it when the norm is applied once."""
    path = request.getfixturevalue(name)
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
    ids = sequences()[0]
    (features,) = captured(load_hf(path), [ids], (7,))
    hidden, _ = reference(path, ids)
    assert (features.taps_TNH[:, 0] - hidden[-1]).abs().max() > 0.1
    torch.testing.assert_close(head.normed(features.taps_TNH[:, 0], "pre_norm"), hidden[-1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["tiny_target", "tiny_llama"])
def test_both_norm_states_give_the_target_logits(
    name: str, request: pytest.FixtureRequest, load_hf: Callable[..., HfEngine]
) -> None:
    path = request.getfixturevalue(name)
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
    post, pre = load_hf(path), load_hf(path)
    pre.norm_state = "pre_norm"
    for ids, a, b in zip(sequences(), captured(post, sequences(), ()), captured(pre, sequences(), ()), strict=True):
        _, logits = reference(path, ids)
        assert (a.norm_state, b.norm_state) == ("post_norm", "pre_norm")
        assert (a.last_TH - b.last_TH).abs().max() > 0.1
        for features in (a, b):
            normed = head.normed(features.last_TH, features.norm_state)
            torch.testing.assert_close(head.logits(normed), logits, atol=1e-4, rtol=0)


def test_softcapped_centred_norm_target(
    save_target: Callable[[Gemma2Config], Path], load_hf: Callable[..., HfEngine]
) -> None:
    """Gemma-2: norms with 1 + weight, alternating windows, capped logits; windows shorter than the sequence."""
    path = save_target(
        Gemma2Config(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=4, final_logit_softcapping=2.0, query_pre_attn_scalar=8,
        )
    )  # fmt: skip
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
    engine = load_hf(path)
    engine.norm_state = "pre_norm"
    for ids, features in zip(sequences(), captured(engine, sequences(), (0, 2)), strict=True):
        hidden, logits = reference(path, ids)
        torch.testing.assert_close(features.taps_TNH[:, 1], hidden[3], atol=ATOL, rtol=0)
        normed = head.normed(features.last_TH, "pre_norm")
        torch.testing.assert_close(normed, hidden[-1], atol=ATOL, rtol=0)
        torch.testing.assert_close(head.logits(normed), logits, atol=1e-4, rtol=0)
        assert logits.abs().max() < 2.0


def test_neighbours_in_the_batch_do_not_matter(qwen3: HfEngine) -> None:
    ids = sequences()[1]
    (alone,) = captured(qwen3, [ids], (2, 7))
    for seed in (1, 2):
        other = captured(qwen3, [*sequences(seed), ids], (2, 7))[-1]
        torch.testing.assert_close(other.taps_TNH, alone.taps_TNH, atol=ATOL, rtol=0)
        torch.testing.assert_close(other.last_TH, alone.last_TH, atol=ATOL, rtol=0)


def test_features_can_train_something(qwen3: HfEngine) -> None:
    """They are detached but ordinary tensors: autograd may save them."""
    (features,) = captured(qwen3, [sequences()[0]], (2,))
    weight = torch.ones(64, requires_grad=True)
    (features.taps_TNH * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.taps_TNH.sum((0, 1)))


def test_the_output_head_never_runs(qwen3: HfEngine) -> None:
    calls = []
    hook = qwen3._target.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    captured(qwen3, sequences(), (1,))
    hook.remove()
    assert not calls
    assert not any(layer._forward_hooks for layer in qwen3._target.layers)


def test_tap_out_of_range_names_the_range(qwen3: HfEngine) -> None:
    for tap in (8, -1):
        with pytest.raises(ConfigError, match="0 to 7") as caught:
            captured(qwen3, sequences(), (1, tap))
        assert caught.value.problems[0].field == "taps"


def test_tokens_of_another_tokenizer(qwen3: HfEngine) -> None:
    with pytest.raises(ValueError, match=r"'s1' has token ids from 4 to 300.*0 to 299"):
        captured(qwen3, [[1, 2], [4, 300]], (1,))
    with pytest.raises(ValueError, match="'s0' has no tokens"):
        captured(qwen3, [[]], (1,))


def test_a_sample_whose_states_are_not_finite_is_quarantined_and_the_others_are_put(
    tiny_target: Path, load_hf: Callable[..., HfEngine]
) -> None:
    engine = load_hf(tiny_target)
    engine._target.base.embed_tokens.weight.data[7] = float("nan")
    sink = MemoryStore()
    batch = [CaptureRequest(record_id="good", input_ids=[1, 2]), CaptureRequest(record_id="bad", input_ids=[1, 7])]
    good, bad = engine.capture(batch, (1,), sink)
    assert isinstance(good, RecordRef)
    assert isinstance(bad, Quarantined)
    assert (good.record_id, bad.record_id) == ("good", "bad")
    assert "not finite in torch.float32: try target.dtype=bfloat16" in bad.reason
    assert len(sink) == 1


def test_empty_batch(qwen3: HfEngine) -> None:
    assert qwen3.capture([], (1,), MemoryStore()) == []
