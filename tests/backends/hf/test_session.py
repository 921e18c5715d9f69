"""Decode sessions against a fresh forward pass over the surviving tokens of every sequence, after random steps,
rollbacks and dropped rows.

Tolerance 1e-4 absolute in float32 for logits of order 10; a position off by one, an unmasked rejected token or a
cache row out of order differ by 0.1 and more.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, MistralConfig, PreTrainedConfig, Qwen3NextConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from torchspec.backends.api import TargetError
from torchspec.backends.hf import session as session_module
from torchspec.backends.hf.cache import cache_name
from torchspec.backends.hf.engine import HfEngine
from torchspec.backends.hf.session import HfDecodeSession

ATOL = 1e-4
TAPS = (1, 7, 4)


def fresh(engine: HfEngine, ids: Sequence[int], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and taps [T, N, H] of one sequence without any cache; the reference of every test here."""
    model, outputs = engine._target.model, {}

    def remember(layer: int) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(layer, output)

    hooks = [engine._target.layers[tap].register_forward_hook(remember(tap)) for tap in taps]
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([outputs[tap][0] for tap in taps], dim=1)


def tokens(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=generator)


def replay(
    engine: HfEngine, lengths: Sequence[int], script: Sequence[tuple[int, int]], seed: int, taps: Sequence[int]
) -> None:
    """Play a script of (tokens per step, what to do after it: 0-3 roll back, 4 drop a row) and compare throughout."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tokens(generator, length).tolist() for length in lengths]
    session = engine.open(rows, taps)
    for row, ids in enumerate(rows):
        logits, expected = fresh(engine, ids, taps)
        torch.testing.assert_close(session.prefill.logits_BV[row], logits[-1], atol=ATOL, rtol=0)
        torch.testing.assert_close(session.prefill.taps[row], expected, atol=ATOL, rtol=0)
    for new, action in script:
        fed_Bn = tokens(generator, len(rows), new)
        output = session.step(fed_Bn)
        rows = [ids + fed.tolist() for ids, fed in zip(rows, fed_Bn, strict=True)]
        for row, ids in enumerate(rows):
            logits, expected = fresh(engine, ids, taps)
            torch.testing.assert_close(output.logits_BnV[row], logits[-new:], atol=ATOL, rtol=0)
            torch.testing.assert_close(output.taps_BnNH[row], expected[-new:], atol=ATOL, rtol=0)
        if action < 4:
            count_B = torch.randint(0, new + 1, (len(rows),), generator=generator)
            session.rollback(count_B)
            rows = [ids[: len(ids) - count] for ids, count in zip(rows, count_B.tolist(), strict=True)]
        elif len(rows) > 1:
            order = torch.randperm(len(rows), generator=generator)[:-1].tolist()
            session.keep(order)
            rows = [rows[row] for row in order]


SCRIPTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(1, 12), script=SCRIPTS, seed=st.integers(0, 1000))
def test_one_sequence(qwen3: HfEngine, length: int, script: list[tuple[int, int]], seed: int) -> None:
    replay(qwen3, [length], script, seed, TAPS)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    script=SCRIPTS,
    seed=st.integers(0, 1000),
    spare=st.sampled_from([0, 2, 32]),
)
def test_ragged_batch(
    llama: HfEngine, lengths: list[int], script: list[tuple[int, int]], seed: int, spare: int
) -> None:
    """`spare` makes squeezing happen at every step, sometimes, or hardly ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "_SPARE_COLUMNS", spare)
        patch.setattr(session_module, "_SPARE_FRACTION", 0.0)
        replay(llama, lengths, script, seed, TAPS)


def test_long_generation_grows_the_cache(qwen3: HfEngine) -> None:
    """Past the first allocation of 375 columns, with rejections in one row only."""
    generator = torch.Generator().manual_seed(5)
    rows = [tokens(generator, 250).tolist(), tokens(generator, 240).tolist()]
    session = qwen3.open(rows, (2,))
    for _ in range(24):
        fed_Bn = tokens(generator, 2, 6)
        output = session.step(fed_Bn)
        session.rollback(torch.tensor([5, 0]))
        rows = [rows[0] + fed_Bn[0, :1].tolist(), rows[1] + fed_Bn[1].tolist()]
    logits, _ = fresh(qwen3, rows[1], (2,))
    torch.testing.assert_close(output.logits_BnV[1], logits[-6:], atol=ATOL, rtol=0)
    logits, _ = fresh(qwen3, rows[0], (2,))
    torch.testing.assert_close(output.logits_BnV[0, 0], logits[-1], atol=ATOL, rtol=0)


def test_columns_stay_bounded(qwen3: HfEngine) -> None:
    """Rows that take turns in rejecting leave gaps everywhere; they are squeezed out."""
    generator = torch.Generator().manual_seed(6)
    session = HfDecodeSession(qwen3._target, [[1, 2, 3], [4, 5]], ())
    for turn in range(40):
        session.step(tokens(generator, 2, 6))
        session.rollback(torch.tensor([6, 0] if turn % 2 else [0, 6]))
    assert max(session._lengths) == 3 + 20 * 6
    assert session._columns <= 123 + 32 + 6


def test_a_lone_survivor_needs_no_mask(qwen3: HfEngine) -> None:
    session = HfDecodeSession(qwen3._target, [[1, 2, 3, 4], [5], [6, 7]], ())
    session.step(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    session.rollback(torch.tensor([0, 1, 2]))
    session.keep([1])
    session.step(torch.tensor([[9]]))
    assert session._keep_BS is None
    assert session._columns == 3


def test_outputs_are_ordinary_tensors(qwen3: HfEngine) -> None:
    session = qwen3.open([[1, 2]], (0,))
    output = session.step(torch.tensor([[3]]))
    for tensor in (session.prefill.logits_BV, session.prefill.taps[0], output.logits_BnV, output.taps_BnNH):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        tensor.add_(1)


def test_no_taps(qwen3: HfEngine) -> None:
    session = qwen3.open([[1, 2, 3]], ())
    assert session.prefill.taps[0].shape == (3, 0, 64)
    assert session.step(torch.tensor([[4, 5]])).taps_BnNH.shape == (1, 2, 0, 64)


GEMMA2 = Gemma2Config(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=5,
)  # fmt: skip
QWEN3_NEXT = Qwen3NextConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip


@pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="transformers too old: refused there")
@pytest.mark.parametrize("config", [GEMMA2, MISTRAL], ids=["gemma2", "mistral"])
def test_sliding_windows_decode_one_by_one(
    config: PreTrainedConfig, save_target: Callable[[PreTrainedConfig], Path], load_hf: Callable[..., HfEngine]
) -> None:
    engine = load_hf(save_target(config))
    assert engine._target.rollback == "window"
    script = [(3, 0), (1, 0), (6, 1), (6, 2), (2, 4), (4, 3), (1, 4), (1, 4), (6, 0)]
    for seed, length in enumerate((2, 4, 5, 9)):
        replay(engine, [length], script, seed, TAPS)
    session = HfDecodeSession(engine._target, [[1, 2, 3]], ())
    for _ in range(10):
        session.step(torch.ones(1, 3, dtype=torch.int64))
    windows = [layer for layer in session._cache.layers if layer.is_sliding]
    assert windows
    assert all(layer.keys.shape[-2] <= 5 - 1 + 3 for layer in windows), "what no rollback can need is let go"
    with pytest.raises(TargetError, match="batch size 1, not 2"):
        engine.open([[1], [2, 3]], ())


def test_recurrent_states_cannot_be_rolled_back(
    save_target: Callable[[PreTrainedConfig], Path], load_hf: Callable[..., HfEngine]
) -> None:
    engine = load_hf(save_target(QWEN3_NEXT))
    with pytest.raises(TargetError, match="cannot run speculative decoding"):
        engine.open([[1, 2]], ())
    assert len(engine.generate([[1, 2], [3]], max_new_tokens=4)) == 2


def test_wrong_use_is_named(qwen3: HfEngine) -> None:
    session = qwen3.open([[1], [2, 3]], ())
    with pytest.raises(ValueError, match=r"\[2, n >= 1\], got \[1, 1\]"):
        session.step(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="cannot forget"):
        session.rollback(torch.tensor([1, 0]))  # nothing of a prompt may be forgotten
    session.step(torch.tensor([[1, 2], [3, 4]]))
    session.rollback(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="cannot forget"):
        session.rollback(torch.tensor([2, 0]))
    for rows in ([], [0, 0], [2]):
        with pytest.raises(ValueError, match="cannot keep rows"):
            session.keep(rows)
    with pytest.raises(ValueError, match="at least one prompt"):
        qwen3.open([], ())
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        qwen3.open([[1], []], ())


def test_the_cache_is_passed_under_the_name_that_the_model_takes(qwen3: HfEngine) -> None:
    """transformers warns of an older name, and a later release will refuse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        session = qwen3.open([[1, 2, 3]], ())
        session.step(torch.tensor([[4, 5]]))


def test_a_model_that_hands_back_no_cache_is_refused(qwen3: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next step would start from nothing, and nobody would notice."""
    model = qwen3._target.model
    forward = model.forward

    @functools.wraps(forward)
    def forgetful(*args: object, **more: object) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=forward(*args, **more).logits)

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(TargetError, match=r"hands back no (cache|past_key_values)"):
        qwen3.open([[1, 2, 3]], ())


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda input_ids, past_key_values=None, **kwargs: None, "past_key_values"),
        (lambda input_ids, cache_params=None: None, "cache_params"),
        (lambda input_ids, cache=None, **kwargs: None, "cache"),
        (lambda *args, **kwargs: None, "cache"),
    ],
)
def test_names_of_the_cache_in_other_releases(forward: Callable[..., None], name: str) -> None:
    model = torch.nn.Module()
    model.forward = forward  # type: ignore[assignment]
    assert cache_name(model) == name  # type: ignore[arg-type]
