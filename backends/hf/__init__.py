"""transformers as target engine: runs inside the trainer's process, on any device torch has."""

from __future__ import annotations

from torchspec.backends.api import Availability, EngineOptions, EngineSpec, TargetEngine, TargetSpec


def _probe() -> Availability:
    try:
        import transformers
    except ImportError as error:
        return Availability(
            ok=False, reason=f"transformers cannot be imported: {error}", hint="pip install 'transformers>=5,<6'"
        )
    return Availability(ok=True, reason=f"transformers {transformers.__version__}")


def _load(options: EngineOptions) -> TargetEngine:
    from torchspec.backends.hf.engine import HfEngine

    return HfEngine.load(options)


def _tensor_parallel_sizes(spec: TargetSpec) -> tuple[int, ...]:
    from torchspec.backends.hf.split_plan import split_plan

    return split_plan(spec).sizes


def _examine(spec: TargetSpec) -> str | None:
    from torchspec.backends.hf.dequantised import examine

    return examine(spec)


SPEC = EngineSpec(
    name="hf",
    probe=_probe,
    load=_load,
    capabilities=frozenset({"capture", "generate", "decode", "images"}),
    tensor_parallel_sizes=_tensor_parallel_sizes,
    examine=_examine,
)
