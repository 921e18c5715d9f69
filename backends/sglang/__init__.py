"""SGLang as target engine: it runs in a worker, in an environment of its own."""

from __future__ import annotations

from torchspec.backends.remote.spec import Engine

ENGINE = Engine(name="sglang", module="sglang", runner="torchspec.backends.sglang.worker")
SPEC = ENGINE.spec()
