"""What to type to serve a target with a draft in SGLang."""

from __future__ import annotations

import shlex
from pathlib import Path

from torchspec.core.errors import ConfigError


def serving_command(target: str, files: Path, draft: str, length: int) -> str:
    """As `EngineSpec.serving_command`: the arguments with which drafts are measured here."""
    from torchspec.backends.sglang.worker.drafts import draft_arguments, draft_problems

    if problems := draft_problems(Path(target), files):
        raise ConfigError(problems)
    arguments = {**draft_arguments(Path(target), files, length), "speculative_draft_model_path": draft}
    words = [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return f"python -m sglang.launch_server --model-path {shlex.quote(target)} {shlex.join(words)}"
