"""What SGLang's engine is constructed with, on each device. Needs no SGLang."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.backends.sglang.worker.drafts import draft_arguments, draft_problems
from torchspec.core.errors import ConfigError, Problem, TargetError
from torchspec.core.workers.runner import WorkerSettings

MARGIN = 8
"""SGLang refuses prompts that come within 7 tokens of the context; records may be as long as the target reads."""

_CPU_POOL = 16_384
_CPU_REQUESTS = 64

DEVICES: dict[str, dict[str, Any]] = {
    # The attention of torch: the AMX kernels that SGLang would choose come in a package that is built from source.
    "cpu": {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "max_running_requests": _CPU_REQUESTS,
    },
    # The sampler of torch takes the seed of each request, as SGLang's own for NPUs does.
    "cuda": {"sampling_backend": "pytorch"},
    "npu": {"attention_backend": "ascend", "sampling_backend": "ascend"},
}

ENVIRONMENT: dict[str, dict[str, str]] = {
    # Compiling the little functions that SGLang marks for it would need a C++ compiler, and takes longer than they do.
    "cpu": {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"},
    "cuda": {},
    "npu": {},
}

_OURS = {
    "model_path": "it is the target",
    "device": "it is engine.device's",
    "tp_size": "engine.tensor_parallel says it",
    "skip_tokenizer_init": "prompts and answers are token ids",
    "allow_auto_truncate": "a shortened prompt would go unnoticed",
    "enable_return_aux_hidden_states": "the layers to capture decide it",
    "return_aux_hidden_state_layer_ids": "the layers to capture decide it",
    "speculative_algorithm": "the draft decides it",
    "speculative_draft_model_path": "it is the draft",
    "speculative_num_steps": "the draft length says it",
    "speculative_eagle_topk": "drafts are chains",
    "speculative_num_draft_tokens": "the draft length says it",
}
_ONLY_IN_CAPTURE = {
    "disable_radix_cache": (True, "SGLang returns no hidden states for the tokens it finds in the cache"),
    "pp_size": (1, "SGLang captures on the last pipeline rank alone"),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the target, as its config.json has it. `dtype` "auto": it doesn't say."""

    layers: int
    context: int
    dtype: str = "auto"


def read_shape(target: Path) -> Shape:
    """TargetError when there is no readable config.json, or it lacks what is needed."""
    path = target / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        dtype = next((c[key] for c in (text, config) for key in ("dtype", "torch_dtype") if c.get(key)), "auto")
        return Shape(
            layers=int(text["num_hidden_layers"]), context=int(text["max_position_embeddings"]), dtype=str(dtype)
        )
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read: {error}") from error
    except KeyError as error:
        raise TargetError(f"{path} has no {error}") from error


def engine_arguments(settings: WorkerSettings, shape: Shape) -> dict[str, Any]:
    """Keyword arguments of `sglang.Engine`. ConfigError names every setting that SGLang cannot take."""
    problems = [*_option_problems(settings), *_capture_problems(settings, shape), *_draft_problems(settings)]
    if problems:
        raise ConfigError(problems)
    arguments: dict[str, Any] = {
        "model_path": str(settings.target),
        "device": settings.device,
        # That of the checkpoint: left alone, SGLang would narrow float32 to float16.
        "dtype": shape.dtype if settings.dtype == "auto" else settings.dtype,
        "tp_size": settings.tensor_parallel,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "random_seed": 0,
        "log_level": "warning",
        # Else its scheduler polls without a pause, and takes a core from the trainer while it has nothing to do.
        "sleep_on_idle": True,
        **DEVICES[settings.device],
    }
    if settings.device == "cpu":
        arguments["max_total_tokens"] = max(_CPU_POOL, shape.context + 2 * MARGIN)
    if settings.memory_fraction is not None:
        arguments["mem_fraction_static"] = settings.memory_fraction
    if settings.taps:
        arguments |= {
            "enable_return_aux_hidden_states": True,
            "speculative_algorithm": "EAGLE3",  # here a convention, id l is layer l's output; no draft is loaded
            "return_aux_hidden_state_layer_ids": sorted(settings.taps),
            "disable_radix_cache": True,
        }
    if settings.draft is None:
        arguments["context_length"] = shape.context + MARGIN
    else:
        arguments |= draft_arguments(settings.target, settings.draft, settings.draft_length)
    return arguments | settings.options


def environment(settings: WorkerSettings, cores: Sequence[int]) -> Mapping[str, str]:
    """Variables that SGLang's processes need. `cores`: the processor's that this process may use."""
    wanted = dict(ENVIRONMENT[settings.device])
    if settings.draft is None:  # as for `context_length`
        wanted["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if settings.device == "cpu" and settings.tensor_parallel > 1:
        # Left alone, SGLang wants a memory node for each rank.
        shares = [cores[rank :: settings.tensor_parallel] for rank in range(settings.tensor_parallel)]
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share or cores[:1])) for share in shares)
    return wanted


def _option_problems(settings: WorkerSettings) -> list[Problem]:
    problems = [
        Problem(
            field=f"engine.options.{name}", message=f"is not for options to say: {why}", value=settings.options[name]
        )
        for name, why in _OURS.items()
        if name in settings.options
    ]
    if settings.device not in DEVICES:
        problems.append(
            Problem(field="engine.device", message="unknown", value=settings.device, choices=tuple(sorted(DEVICES)))
        )
    return problems


def _capture_problems(settings: WorkerSettings, shape: Shape) -> list[Problem]:
    if not settings.taps:
        return []
    problems = [
        Problem(
            field=f"engine.options.{name}", message=f"must be {needed} where layers are captured: {why}", value=value
        )
        for name, (needed, why) in _ONLY_IN_CAPTURE.items()
        if (value := settings.options.get(name, needed)) != needed
    ]
    for tap in settings.taps:
        if not 0 <= tap < shape.layers:
            problems.append(
                Problem(field="taps", message=f"the target has layers 0 to {shape.layers - 1} and no layer {tap}")
            )
        elif tap == shape.layers - 1:
            problems.append(
                Problem(
                    field="taps",
                    message=f"SGLang cannot capture layer {tap}, the target's last: it takes a layer's output where "
                    "the next one reads it",
                    remedy=f"choose among layers 0 to {tap - 1}; every record has the last layer's output anyway",
                )
            )
    if len(set(settings.taps)) < len(settings.taps):
        problems.append(Problem(field="taps", message="a layer is named twice", value=settings.taps))
    if settings.store is None:
        problems.append(Problem(field="store", message="capturing needs a feature store"))
    if settings.draft is not None:
        problems.append(
            Problem(
                field="draft",
                message="SGLang cannot capture layers and decode with a draft in one engine",
                remedy="start one worker that captures and another that decodes",
            )
        )
    return problems


def _draft_problems(settings: WorkerSettings) -> list[Problem]:
    if settings.draft is None:
        return []
    problems = []
    if settings.draft_length < 1:
        problems.append(
            Problem(field="draft_length", message="a draft must draft at least one token", value=settings.draft_length)
        )
    return problems + draft_problems(settings.target, settings.draft)
