"""The engine of the registry name `hf`."""

from __future__ import annotations

from collections.abc import Sequence

from torchspec.backends.api import (
    Captured,
    CaptureRequest,
    DecodeSession,
    EngineOptions,
    FeatureSink,
    Images,
    NormState,
    TargetSpec,
)
from torchspec.backends.hf.capture import capture
from torchspec.backends.hf.generate import generate
from torchspec.backends.hf.session import HfDecodeSession
from torchspec.backends.hf.target import HfTarget, load_target


class HfEngine:
    """Implements `interfaces.engine.TargetEngine` in the caller's process.

    `norm_state` says which last hidden states `capture` hands out; what the trainer makes of them is the same.
    """

    def __init__(self, target: HfTarget, *, norm_state: NormState = "post_norm") -> None:
        self._spec = target.spec
        self._loaded: HfTarget | None = target
        self.norm_state = norm_state

    @classmethod
    def load(cls, options: EngineOptions) -> HfEngine:
        """Load the target of these options; TargetError says what is wrong with its directory."""
        return cls(load_target(options))

    @property
    def _target(self) -> HfTarget:
        if self._loaded is None:
            raise RuntimeError(f"the engine of {self._spec.path} is closed")
        return self._loaded

    def describe(self) -> TargetSpec:
        return self._spec

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        """See `backends.hf.capture.capture`."""
        return capture(self._target, batch, taps, sink, self.norm_state)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[Images] = (),
    ) -> list[list[int]]:
        """See `backends.hf.generate.generate`."""
        return generate(
            self._target, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, images=images
        )

    def open(
        self, prompts: Sequence[Sequence[int]], taps: Sequence[int], *, images: Sequence[Images] = ()
    ) -> DecodeSession:
        """A decode session over these prompts, prefilled; see `backends.hf.session.HfDecodeSession`."""
        return HfDecodeSession(self._target, prompts, taps, images=images)

    def close(self) -> None:
        """Let go of the model; its memory is free once no session holds it. Closing twice is fine."""
        self._loaded = None
