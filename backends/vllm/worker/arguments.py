"""What vLLM is started with: its constructor's arguments and its environment variables, per device.

Layers are numbered from 1 in vLLM (0 is the embedding), so torchspec's tap l is its id l + 1, and the id of the number
of layers is the last layer's output before the final norm. It hands out captured layers in ascending order.
"""

from __future__ import annotations

from typing import Any

from torchspec.backends.vllm.worker.drafts import speculative_config
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.models.target_processor import takes_images
from torchspec.core.workers.runner import WorkerSettings

CONNECTOR = "TorchspecConnector"
OURS = ("speculative_config", "kv_transfer_config")
"""Arguments by which vLLM captures or drafts."""


def layer_ids(taps: tuple[int, ...], layers: int) -> list[int]:
    """vLLM's ids of the taps and of the last hidden states, ascending, each once."""
    return sorted({*(tap + 1 for tap in taps), layers})


def engine_arguments(settings: WorkerSettings, layers: int, context: int) -> dict[str, Any]:
    """Keyword arguments of `vllm.EngineArgs`. ConfigError for options that would take away what torchspec needs."""
    problems = [_taken(name) for name in OURS if name in settings.options]
    if settings.device == "cpu" and settings.memory_fraction is not None:
        message, remedy = "vLLM's memory on a CPU is not a fraction of it", "set VLLM_CPU_KVCACHE_SPACE (GiB) instead"
        problems.append(Problem(field="engine.memory_fraction", message=message, remedy=remedy))
    if problems:
        raise ConfigError(problems)
    arguments: dict[str, Any] = {
        "model": str(settings.target),
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        "tensor_parallel_size": settings.tensor_parallel,
        "skip_tokenizer_init": not takes_images(settings.target),  # prompts and answers are token ids
        "seed": 0,
        "disable_log_stats": False,  # its counters are read
    }
    if settings.device == "cpu":
        arguments["enforce_eager"] = True  # compiling takes longer than it saves
        if not settings.taps:
            # vLLM 0.32 sets a request's random generator back after a piece of its prompt, which the CPU's cannot do.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 8192)}
    elif settings.memory_fraction is not None:
        arguments["gpu_memory_utilization"] = settings.memory_fraction
    if settings.taps:
        arguments |= _capturing(settings, layers)
        # One more than the target reads, for the token that vLLM insists on writing; it is never read back.
        arguments["max_model_len"] = context + 1
    if takes_images(settings.target):
        arguments["limit_mm_per_prompt"] = {"video": 0, "audio": 0}  # for which vLLM would set memory aside
    if settings.draft is not None:
        arguments["speculative_config"] = speculative_config(settings.target, settings.draft, settings.draft_length)
        arguments["per_request_spec_decode_metrics"] = "detailed"
    return {**arguments, **settings.options}


def _capturing(settings: WorkerSettings, layers: int) -> dict[str, Any]:
    ids = layer_ids(settings.taps, layers)
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
        },
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": "torchspec.backends.vllm.worker.connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "torchspec": {
                    "store": str(settings.store),
                    "store_bytes": settings.store_bytes,
                    "taps": list(settings.taps),
                    "layers": layers,
                }
            },
        },
    }


def environment(settings: WorkerSettings) -> dict[str, str]:
    """Variables that vLLM reads when it is imported; the user's own go before them."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if settings.taps:
        variables["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if settings.tensor_parallel == 1:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker is a process of its own already
    if settings.device == "cpu":
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return variables


def _taken(name: str) -> Problem:
    return Problem(
        field=f"engine.options.{name}",
        message="vLLM captures and drafts by it, so torchspec sets it",
        remedy="leave it out",
    )
