"""The engine under test with its target. It is started when a check needs it, and once for all that need it alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.backends.api import (
    Captured,
    CaptureRequest,
    EngineOptions,
    EngineProcess,
    EngineSpec,
    Features,
    RecordRef,
    TargetEngine,
    TargetSpec,
)
from torchspec.backends.conformance.oracle import Oracle
from torchspec.core import registry
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, running_dtype

# What an engine's own kernels and the precision it runs in may do to hidden states, as ||got - exact|| / ||exact||.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the engine is started; goes to the checking process as JSON. `process`: of `EngineProcess`, by name."""

    name: str
    target: str
    device: str
    dtype: str = "auto"
    trust_remote_code: bool = False
    process: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Setting:
        return cls(**json.loads(text))


class Subject:
    """At most one engine runs at a time; `close` ends it."""

    def __init__(
        self, setting: Setting, load: Callable[[str, EngineOptions], TargetEngine] = registry.load_engine
    ) -> None:
        self._load = load
        self.setting = setting
        self.spec: EngineSpec = registry.backends().spec(setting.name)
        self.path = Path(setting.target)
        self.target: TargetSpec = read_target_spec(self.path, setting.trust_remote_code)
        self.device = registry.load_device(setting.device)
        self.where = self.device.runtime.bind(0)
        self.dtype = running_dtype(setting.dtype, self.target.dtype, self.where)
        count = self.target.num_layers
        self.taps = tuple(sorted({min(1, count - 1), count // 2, max(0, count - 2)}))
        self.oracle = Oracle(self.path, self.taps, trust_remote_code=setting.trust_remote_code)
        self._running: tuple[Any, TargetEngine] | None = None

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def allowance(self) -> float:
        """How far behind the target's first choice a greedy token may be, in standard deviations of the logits."""
        return 20 * self.tolerance

    @cached_property
    def head(self) -> Any:
        return load_target_head(
            self.path,
            dtype=torch.float32,
            device=torch.device("cpu"),
            trust_remote_code=self.setting.trust_remote_code,
        )

    def options(self, taps: Sequence[int], extra: Mapping[str, Any]) -> EngineOptions:
        told = dict(self.setting.process)
        told["options"] = {**told.get("options", {}), **extra}
        if told.get("python") is not None:
            told["python"] = Path(told["python"])
        return EngineOptions(
            target=self.path,
            device=self.device,
            dtype=self.setting.dtype,
            trust_remote_code=self.setting.trust_remote_code,
            taps=tuple(taps),
            process=replace(EngineProcess(), **told),
        )

    def engine(self, taps: Sequence[int] = (), extra: Mapping[str, Any] | None = None) -> TargetEngine:
        """Running, with these taps, and with `extra` arguments of its own constructor."""
        wanted = (tuple(taps), json.dumps(extra or {}, sort_keys=True))
        if self._running is not None and self._running[0] == wanted:
            return self._running[1]
        self.close()
        started = self._load(self.setting.name, self.options(taps, extra or {}))
        self._running = (wanted, started)
        return started

    @property
    def capturing(self) -> TargetEngine:
        return self.engine(self.taps)

    def close(self) -> None:
        if self._running is not None:
            self._running[1].close()
            self._running = None

    def tokens(self, length: int, seed: int) -> list[int]:
        """Random ids of the vocabulary but the first few and the last, which may be special."""
        made = torch.Generator().manual_seed(seed)
        most = max(8, self.target.vocab_size * 9 // 10)
        return [int(token) for token in torch.randint(5, most, (length,), generator=made)]

    def prompts(self, new: int) -> list[list[int]]:
        """Short ones and longer ones, each with room for so many new tokens."""
        most = self.target.max_position_embeddings - new
        return [self.tokens(min(length, most), length) for length in (1, 7, 40, 130)]

    def check_end(self, text: Sequence[int], limit: int) -> None:
        """AssertionError unless a text ends at its first end-of-turn token, which is part of it, or at the limit."""
        assert 1 <= len(text) <= limit, f"a text of {len(text)} tokens, at most {limit} were asked for"
        ends = set(self.target.eos_token_ids)
        assert not ends & set(text[:-1]), "a text goes on after the end of the turn"
        assert len(text) == limit or text[-1] in ends, "a text ends before its end-of-turn token and before its limit"

    def captured(
        self, engine: TargetEngine, ids: Sequence[Sequence[int]]
    ) -> tuple[list[Captured], list[Features | None]]:
        """What `capture` returned, and the records' features (None for those in quarantine)."""
        store = MemoryStore()
        requests = [CaptureRequest(record_id=f"sample {n}", input_ids=list(each)) for n, each in enumerate(ids)]
        found = engine.capture(requests, self.taps, store)
        return found, [take(store, each) if isinstance(each, RecordRef) else None for each in found]

    def error(self, what: str, got: Tensor, exact: Tensor) -> float:
        """Relative error; AssertionError where shapes differ, or it is beyond the tolerance of the running dtype."""
        assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        far = got.detach().cpu().double()
        assert bool(far.isfinite().all()), f"{what}: not finite"
        error = float((far - exact.double()).norm() / exact.double().norm().clamp(min=1e-6))
        assert error <= self.tolerance, f"{what}: off by {error:.2g} of its norm; {self.tolerance:.0e} is allowed"
        return error

    def features_error(self, features: Features, ids: Sequence[int], what: str) -> float:
        """The larger of the errors of taps and of normed last hidden states."""
        exact = self.oracle.of(ids)
        assert features.tap_layers == self.taps, f"{what}: taps of layers {features.tap_layers}, not {self.taps}"
        per_tap = [
            self.error(f"{what}, tap of layer {layer}", features.taps_TNH[:, n].float(), exact.taps_TNH[:, n])
            for n, layer in enumerate(self.taps)
        ]
        normed = self.head.normed(features.last_TH.float().cpu(), features.norm_state)
        last = self.error(f"{what}, last hidden state ({features.norm_state})", normed, exact.last_TH)
        return max(last, *per_tap)
