"""Which SGLang this plug-in fits. It hooks functions that are no public interface, so it looks before it leaps."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable

from torchspec.core.errors import UnavailableError

TESTED = ("0.5.23",)

APPEND = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._append_prefill_hidden_states"
)
FINISH = "sglang.srt.managers.schedule_batch.Req._check_token_based_finish"
ROUND = "sglang.srt.managers.schedule_batch.Req.update_spec_correct_drafts_histogram"
SAMPLING = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
FROM_PROBS = "sglang.srt.layers.sampler.Sampler._sample_from_probs"
FROM_LOGITS = "sglang.srt.layers.sampler.Sampler._sample_from_logits"

PARAMETERS: dict[str, tuple[str, ...]] = {
    APPEND: (
        "self", "req", "logits_output", "hidden_state_offset", "capture_hidden_mode", "extend_input_len", "store",
    ),
    FINISH: ("self", "new_accepted_tokens"),
    ROUND: ("self", "num_correct_drafts"),
    SAMPLING: ("batch", "vocab_size"),
    FROM_PROBS: ("self", "probs", "sampling_info", "positions", "simple_sampling_case"),
    FROM_LOGITS: ("self", "logits", "sampling_info", "simple_sampling_case", "positions"),
}  # fmt: skip


def check_version(version: str, resolve: Callable[[str], object] = pkgutil.resolve_name) -> str | None:
    """None for a tested version, a warning for another one that looks alike.

    UnavailableError when a function that the plug-in hooks is gone or takes other parameters.
    """
    for target, expected in PARAMETERS.items():
        try:
            found = tuple(inspect.signature(resolve(target)).parameters)  # type: ignore[arg-type]
        except (ImportError, AttributeError) as error:
            raise _moved(version, f"{target} is gone ({error})") from error
        if found != expected:
            raise _moved(version, f"{target} takes {', '.join(found)}, where {', '.join(expected)} were expected")
    if version in TESTED:
        return None
    return (
        f"SGLang {version} was never tested with this torchspec, only {', '.join(TESTED)}. What torchspec hooks is "
        "there, so it goes on"
    )


def _moved(version: str, how: str) -> UnavailableError:
    return UnavailableError(
        f"SGLang moved: in version {version}, {how}\n    remedy: install a tested version: "
        f"{', '.join(f'sglang=={each}' for each in TESTED)}"
    )
