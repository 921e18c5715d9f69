"""vllm as target engine: the name is taken, the adapter is not part of this release."""

from __future__ import annotations

from torchspec.backends.api import Availability, EngineOptions, EngineSpec, TargetEngine, UnavailableError

_REASON = "this release of torchspec has no adapter for vllm yet"
_HINT = (
    "--backend hf captures, generates and evaluates with the same target in this process. "
    "The adapter will run vllm in a Python environment of its own, so installing it here changes nothing"
)


def _probe() -> Availability:
    return Availability(ok=False, reason=_REASON, hint=_HINT)


def _load(options: EngineOptions) -> TargetEngine:
    raise UnavailableError(f"backend 'vllm' cannot load {options.target}: {_REASON}\n    remedy: {_HINT}")


SPEC = EngineSpec(name="vllm", probe=_probe, load=_load, capabilities=frozenset())
