"""vLLM as target engine: it runs in a worker, in an environment of its own."""

from __future__ import annotations

from torchspec.backends.remote.spec import Engine
from torchspec.backends.vllm.commands import serving_command

# Few sequences at a time as well; and nothing that forbids vLLM to keep prefixes.
PIECES = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_num_seqs": 8}
ENGINE = Engine(
    name="vllm",
    module="vllm",
    runner="torchspec.backends.vllm.worker",
    serving_command=serving_command,
    pieces=PIECES,
)
SPEC = ENGINE.spec()
