"""SGLang inside a worker: what runs in its own processes, and the runner that the server drives."""

from __future__ import annotations

from torchspec.core.workers.runner import Runner, WorkerSettings


def make_runner(settings: WorkerSettings) -> Runner:
    """SGLang with the target loaded, its hooks proven. Call it from the main thread: SGLang sets signal handlers."""
    from torchspec.backends.sglang.worker.start import start_engine

    return start_engine(settings)
