"""Decoding with a draft on a CPU without AMX: what SGLang's attention in torch lacks for it, for chains of drafts.

A draft's own step i reads the keys and values of i tokens that no length counts yet; verification reads those of all
drafted tokens, each token those before it. Both are the plain attention with other lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory."
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend"
_NAME = "torch_native"


def register_chains() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_FACTORY + "create_decode_backend", drafting_attention, HookType.AROUND)
    HookRegistry.register(_FACTORY + "create_draft_extend_backend", extending_attention, HookType.AROUND)
    HookRegistry.register(_ATTENTION, verify_or_extend, HookType.AROUND)


def extending_attention(_: Any, factory: Any) -> Any:
    """For the draft's pass over tokens that the target confirmed."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return _named(TorchNativeAttnBackend(factory.draft_model_runner))


def drafting_attention(_: Any, factory: Any) -> Any:
    """For the draft's steps after the first, which is part of the pass before; None where there is one step."""
    if factory.speculative_num_steps <= 1:
        return None
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class Step(TorchNativeAttnBackend):  # type: ignore[misc,unused-ignore]
        """Step i: what the request holds, and the i + 1 tokens drafted so far."""

        def __init__(self, runner: Any, step: int) -> None:
            super().__init__(runner)
            self.step = step

        def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, *rest: Any, **named: Any) -> Any:
            with _lengths(batch, seq_lens=batch.seq_lens + self.step + 1):
                return super().forward_decode(q, k, v, layer, batch, *rest, **named)

    class Steps:
        def __init__(self) -> None:
            steps = factory.speculative_num_steps - 1
            self.attn_backends = [_named(Step(factory.draft_model_runner, step)) for step in range(steps)]

        def init_forward_metadata(self, batch: Any) -> None:
            for backend in self.attn_backends:
                backend.init_forward_metadata(batch)

    return _named(Steps())


def verify_or_extend(
    original: Any, backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *rest: Any, **named: Any
) -> Any:
    """Verification extends every request by its drafted tokens; SGLang leaves the lengths as they were."""
    if not batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, batch, *rest, **named)
    held, drafted = batch.seq_lens, batch.spec_info.draft_token_num
    with _lengths(
        batch,
        seq_lens=held + drafted,
        extend_prefix_lens=held,
        extend_seq_lens=held.new_full(held.shape, drafted),
    ):
        return original(backend, q, k, v, layer, batch, *rest, **named)


@contextmanager
def _lengths(batch: Any, **others: Any) -> Iterator[None]:
    before = {name: getattr(batch, name) for name in others}
    for name, value in others.items():
        setattr(batch, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(batch, name, value)


def _named(backend: Any) -> Any:
    """SGLang asks every backend what it is called."""
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = _NAME
    return backend
