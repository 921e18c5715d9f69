"""What to type to serve a target with a draft in vLLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def serving_command(target: str, files: Path, draft: str, length: int) -> str:
    """As `EngineSpec.serving_command`: the arguments with which drafts are measured here."""
    from torchspec.backends.vllm.worker.drafts import speculative_config

    chosen = {**speculative_config(Path(target), files, length), "model": draft}
    return f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(json.dumps(chosen))}"
