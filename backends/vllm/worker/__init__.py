"""vLLM inside a worker. Imports vLLM only when a runner is made."""

from __future__ import annotations

from torchspec.core.workers.runner import Runner, WorkerSettings


def make_runner(settings: WorkerSettings) -> Runner:
    """The engine with its target loaded, and shown to capture what it was asked for."""
    from torchspec.backends.vllm.worker.engine import VllmRunner

    return VllmRunner(settings)
