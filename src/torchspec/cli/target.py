"""Checking and loading what the commands that run a target name: eval, generate, quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchspec.cli.schemas import TargetOptions
from torchspec.core import registry, settings
from torchspec.core.config import environment
from torchspec.core.errors import ConfigError, Problem, TorchspecError
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import EngineOptions, TargetEngine
from torchspec.core.models.target_spec import resolve_target, running_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loaded target; `dtype` is the precision it runs in, `images`: whether its engine takes any."""

    path: Path
    device: Device
    torch_device: torch.device
    engine: TargetEngine
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    images: bool


def check(
    options: TargetOptions,
    capability: str,
    files: Sequence[Path] = (),
    *,
    output: Path | None = None,
    reads: Sequence[Path] = (),
) -> None:
    """Raise ConfigError with everything that cannot work: adapters, the capability needed, files, target and draft.

    `output` is a file to write, which must be none of `files` and none of `reads`, read beside them.
    """
    problems: list[Problem] = []
    backend = registry.backends()
    engine = options.engine_config()
    section = engine.model_dump() if capability != "decode" else {}
    faults = environment.engine_problems("--backend", options.backend, options.device, section)
    if not faults and capability not in backend.spec(options.backend).capabilities:
        able = tuple(name for name in backend.names() if _has(name, capability))
        message = f"cannot {capability}"
        faults = [Problem(field="--backend", value=options.backend, message=message, choices=able)]
    if not faults and capability == "generate" and backend.spec(options.backend).available is None:
        message = f"backend {options.backend} runs inside this process and has no such setting"
        faults += [
            Problem(field=f"--engine-{name.replace('_', '-')}", message=message, remedy="leave it out")
            for name in sorted(engine.model_fields_set)
        ]
    problems += faults
    serving = getattr(options, "engine", None)
    if serving is not None:
        problems += _serving_problems(serving, options)
    try:
        name, _ = registry.choose_device(options.device, settings.default_device())
        problems += environment.adapter_problems("--device", name, registry.devices())
    except ConfigError as error:
        problems += error.problems
    problems += environment.file_problems("--data", files)
    if options.chat_template is not None:
        problems += environment.file_problems("--chat-template", [options.chat_template])
    draft: Path | None = getattr(options, "draft", None)
    if draft is not None and not draft.is_dir():
        remedy = "name the directory of an exported draft, of a run or of a checkpoint"
        problems.append(Problem(field="--draft", value=str(draft), message="no such directory", remedy=remedy))
    problems += _output_problems(output, [*files, *reads]) if output is not None else []
    problems += environment.target_problems("--target", options.target)
    if problems:
        raise ConfigError(problems)


def _serving_problems(name: str, options: TargetOptions) -> list[Problem]:
    """Why the serving engine of this name cannot be used."""
    section = options.engine_config().model_dump()
    faults = environment.engine_problems("--engine", name, options.device, section)
    if faults:
        return faults
    if "serve" not in registry.backends().spec(name).capabilities:
        able = tuple(each for each in registry.backends().names() if _has(each, "serve"))
        return [Problem(field="--engine", value=name, message="does not serve drafts", choices=able)]
    if options.engine_config().url is not None:
        message = "a draft is decoded in an engine that is started with it, not in one that runs already"
        return [Problem(field="--engine-url", message=message, remedy="leave it out")]
    return []


def _output_problems(output: Path, reads: Sequence[Path]) -> list[Problem]:
    message = ""
    if output.is_dir():
        message = "is a directory, not a file"
    elif output.resolve() in {path.resolve() for path in reads}:
        message = "is one of the files that are read"
    if message:
        return [Problem(field="--output", value=str(output), message=message, remedy="name another file")]
    return environment.output_problems("--output", output.parent)


def _has(name: str, capability: str) -> bool:
    try:
        return capability in registry.backends().spec(name).capabilities
    except TorchspecError:
        return False


def load_target(options: TargetOptions) -> Target:
    """Load device, tokenizer and engine; the options have been checked."""
    from torchspec.core.data.tokenizer import load_tokenizer

    path = resolve_target(options.target)
    tokenizer = load_tokenizer(
        path,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
        thinking=options.thinking,
    )
    device = registry.load_device(registry.choose_device(options.device, settings.default_device())[0])
    torch_device = device.runtime.bind(0)
    engine = registry.load_engine(
        options.backend,
        EngineOptions(
            target=path,
            device=device,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            process=options.engine_config().process(),
        ),
    )
    return Target(
        path=path,
        device=device,
        torch_device=torch_device,
        engine=engine,
        tokenizer=tokenizer,
        images=_has(options.backend, "images"),
        dtype=running_dtype(options.dtype, engine.describe().dtype, torch_device),
    )
