"""SGLang as target engine: it runs in a worker, in an environment of its own."""

from __future__ import annotations

from torchspec.backends.remote.spec import Engine
from torchspec.backends.sglang.commands import serving_command

PIECES = {"chunked_prefill_size": 64, "max_running_requests": 8}
ENGINE = Engine(
    name="sglang",
    module="sglang",
    runner="torchspec.backends.sglang.worker",
    serving_command=serving_command,
    pieces=PIECES,
)
SPEC = ENGINE.spec()
