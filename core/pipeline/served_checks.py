"""Validation in a serving engine, put together from a run's configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torchspec.core import registry
from torchspec.core.config import environment
from torchspec.core.config.schema import EngineConfig, RunConfig, Section
from torchspec.core.errors import Problem
from torchspec.core.interfaces.engine import EngineSpec
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.launch import torchspec_command
from torchspec.core.settings import started_here
from torchspec.core.training.served import ServedChecks

SERVED = "served"


def given(section: Section) -> list[str]:
    """Settings with another value than their default; a run's own file repeats the defaults."""
    fields = type(section).model_fields
    defaults = {name: info.get_default(call_default_factory=True, validated_data={}) for name, info in fields.items()}
    return sorted(name for name, value in section if value != defaults[name])


def serving_engine(config: RunConfig, backend: EngineSpec | None) -> str | None:
    """Which engine validates: the one named; of a backend that serves but cannot be stepped by our decoder, itself."""
    if config.eval.engine is not None or not config.data.validation or backend is None:
        return config.eval.engine
    itself = "decode" not in backend.capabilities and "serve" in backend.capabilities
    return config.backend if itself else None


def measured_apart(config: RunConfig, backend: EngineSpec | None) -> str | None:
    """Which engine measures checkpoints in a process of its own: one that serves; or, where the trainer has no engine
    inside, the backend with our own decoder. None: the trainer decodes, or nothing is validated."""
    engine = serving_engine(config, backend)
    if engine is not None or not config.data.validation or backend is None:
        return engine
    return config.backend if config.pipeline.topology != "inprocess" and "decode" in backend.capabilities else None


def serving_process(config: RunConfig) -> EngineConfig:
    """`eval.serving`; the interpreter of the backend serves its own engine too."""
    serving = config.eval.serving
    same = config.eval.engine in (None, config.backend)
    if same and serving.python is None and config.engine.python is not None:
        return serving.model_copy(update={"python": config.engine.python})
    return serving


def serving_problems(config: RunConfig, backend: EngineSpec) -> list[Problem]:
    """Settings that mean nothing to an engine that is started for each validation."""
    found = []
    engine = config.eval.engine
    if engine is not None and engine in registry.backends().names():
        found += _engine_problems(config, engine)
    elif engine is not None:
        names = registry.backends().names()
        found.append(Problem(field="eval.engine", value=engine, message="no engine of this name", choices=names))
    for name in ("url", "store_mb"):
        if getattr(config.eval.serving, name) is not None:
            message = "an engine is started for each validation, and captures nothing"
            found.append(Problem(field=f"eval.serving.{name}", message=message, remedy="leave it out"))
    if config.eval.engine is not None and not config.data.validation:
        message, remedy = "validates on nothing", "give data.validation, or leave eval.engine out"
        found.append(Problem(field="eval.engine", value=config.eval.engine, message=message, remedy=remedy))
    if serving_engine(config, backend) is None:
        apart = measured_apart(config, backend) is not None  # by our own decoder, in a process all the same
        idle = [name for name in given(config.eval) if name in ("devices", "timeout", "tolerance")[2 * apart :]]
        idle += [f"serving.{name}" for name in given(config.eval.serving)]
        own = "is for validation in a serving engine"
        found += [Problem(field=f"eval.{name}", message=own, remedy="give eval.engine too") for name in idle]
    return found


def _engine_problems(config: RunConfig, engine: str) -> list[Problem]:
    if "serve" not in registry.backends().spec(engine).capabilities:
        message = "does not serve drafts"
        return [Problem(field="eval.engine", value=engine, message=message, remedy="leave it out for our own decoder")]
    return environment.engine_problems("eval.engine", engine, config.device, serving_process(config).model_dump())


def served_checks(config: RunConfig, engine: str, device: str, visible: str | None) -> ServedChecks:
    """`visible` is the variable that hides accelerators from a process, where there are any."""
    serves = "serve" in registry.backends().spec(engine).capabilities
    process = serving_process(config)
    engine_words = ["--engine", engine, "--tolerance", str(config.eval.tolerance)]
    engine_words += ["--engine-tensor-parallel", str(process.tensor_parallel)]
    engine_words += ["--engine-start-timeout", str(process.start_timeout)]
    engine_words += ["--engine-call-timeout", str(process.call_timeout)]
    engine_words += ["--engine-options", json.dumps(process.options)]
    for flag, value in (("--engine-python", process.python), ("--engine-memory-fraction", process.memory_fraction)):
        engine_words += [] if value is None else [flag, str(value)]

    def command(checkpoint: Path, result: Path) -> Sequence[str]:
        evaluation, target = config.eval, config.target
        words = ["eval", "--target", str(target.path), "--draft", str(checkpoint)]
        words += ["--data", *map(str, config.data.validation), "--output", str(result), "--device", device]
        words += ["--dtype", target.dtype, "--max-length", str(config.data.max_length)]
        words += ["--samples", str(evaluation.samples), "--max-new-tokens", str(evaluation.max_new_tokens)]
        words += ["--draft-length", str(evaluation.draft_length), "--temperature", str(evaluation.temperature)]
        words += ["--batch-size", str(evaluation.batch_size), "--seed", str(config.seed)]
        words += engine_words if serves else ["--backend", engine]
        words += [] if target.chat_template is None else ["--chat-template", str(target.chat_template)]
        words += ["--thinking", target.thinking]
        words += ["--trust-remote-code"] if target.trust_remote_code else []
        hide = visible is not None and evaluation.devices
        seen = [f"{visible}={','.join(map(str, evaluation.devices))}"] if hide else []
        return ["env", *started_here(), *seen, *torchspec_command(words)]

    return ServedChecks(
        config.output / SERVED,
        config.output / run_dir.CHECKPOINTS,
        command,
        engine=engine,
        timeout=config.eval.timeout,
    )
