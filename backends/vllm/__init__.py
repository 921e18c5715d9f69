"""vLLM as target engine: it runs in a worker, in an environment of its own."""

from __future__ import annotations

from torchspec.backends.remote.spec import Engine

ENGINE = Engine(name="vllm", module="vllm", runner="torchspec.backends.vllm.worker")
SPEC = ENGINE.spec()
