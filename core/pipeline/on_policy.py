"""A run whose answers the target writes: what it asks of the configuration, and who writes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchspec.core.config.schema import RunConfig
from torchspec.core.decoding import pushed
from torchspec.core.decoding.pushed import PushedDraft
from torchspec.core.decoding.writing import TextWriter
from torchspec.core.errors import DataError, Problem
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import DraftSource, EngineSpec, TargetSpec
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.pipeline.served_checks import given
from torchspec.core.training.capturing import Model
from torchspec.core.training.sharding import COMPUTE, unsharded_state
from torchspec.core.training.written import Writing, WrittenNow

logger = logging.getLogger(__name__)

PUSHED = "pushed"
"""Folder of a run with the drafts that its engines write with."""


def on_policy_problems(config: RunConfig, backend: EngineSpec | None) -> list[Problem]:
    """Of the `on_policy` section: what it would ignore, and what it cannot do."""
    wanted = config.on_policy
    if not wanted.enabled:
        message, remedy = "means nothing without on_policy.enabled", "give --on-policy, or leave it out"
        return [
            Problem(field=f"on_policy.{name}", message=message, remedy=remedy)
            for name in given(wanted)
            if name != "enabled"
        ]
    found = []
    if config.pipeline.topology == "offline":
        message = "with pipeline.topology=offline there is no target to write"
        found.append(Problem(field="on_policy.enabled", message=message, remedy="name another topology"))
    least = config.data.min_supervised_tokens
    if least > wanted.max_new_tokens:
        message = f"no answer gets as long with on_policy.max_new_tokens={wanted.max_new_tokens}"
        found.append(Problem(field="data.min_supervised_tokens", value=least, message=message, remedy="give less"))
    if "last_turn_only" in given(config.data):
        message = "only the answer that is written is supervised with on_policy.enabled"
        found.append(Problem(field="data.last_turn_only", message=message, remedy="leave it out"))
    if wanted.draft_length and backend is not None and "decode" not in backend.capabilities:
        message = f"{backend.name} takes no drafts while it runs"
        remedy = "leave it out: the target writes alone; or use a backend with `decode`, such as hf"
        found.append(Problem(field="on_policy.draft_length", value=wanted.draft_length, message=message, remedy=remedy))
    if not wanted.draft_length and "push_every" in given(wanted):
        message, remedy = "no draft is handed over with on_policy.draft_length=0", "leave it out, or give a length"
        found.append(Problem(field="on_policy.push_every", value=wanted.push_every, message=message, remedy=remedy))
    return found


def check_countable(algorithm: Algorithm, target: TargetSpec, counts_V: Tensor) -> None:
    """DataError where a draft's vocabulary is to be chosen by use and the data hold no answers, of which these are the
    counts; a warning where the answers use fewer tokens than are to be chosen."""
    used, size = int((counts_V > 0).sum()), algorithm.vocabulary_size
    if size == target.vocab_size or used >= size:
        return
    remedy = (
        f"give draft.vocab_size={target.vocab_size}, or add conversations with answers (`torchspec generate` writes "
        "some)"
    )
    which = f"which {size} of the target's {target.vocab_size} tokens the draft should know is decided by the answers"
    if not used:
        raise DataError(f"{which} in the data, and there are prompts alone\n    remedy: {remedy}")
    logger.warning("%s in the data, and these use %d. The target may use others: %s", which, used, remedy)


def writing_of(config: RunConfig, target: TargetSpec) -> Writing | None:
    """How answers are written; None where the data have them."""
    wanted = config.on_policy
    if not wanted.enabled:
        return None
    return Writing(
        max_new_tokens=wanted.max_new_tokens,
        max_length=config.data.max_length,
        context=target.max_position_embeddings,
        temperature=wanted.temperature,
        seed=config.seed,
        source=_source(config),
    )


def written_now(config: RunConfig, model: Model, target: TargetSpec, context: ParallelContext) -> WrittenNow | None:
    """By the target of this process."""
    writing = writing_of(config, target)
    if writing is None:
        return None
    assert model.engine is not None

    def follow(source: DraftSource) -> PushedDraft:
        return PushedDraft(source.directory, target, lambda: model.head, context.device, context.torch_device)

    return WrittenNow(TextWriter(model.engine, follow), writing, context)


def pusher(config: RunConfig, model: Model, context: ParallelContext) -> Callable[[int], None] | None:
    """Hands the draft over as it is after a step, to whoever writes with it. Collective."""
    source = _source(config) if config.on_policy.enabled else None
    if source is None:
        return None
    directory: Path = source.directory
    dtype = COMPUTE[config.precision.compute] or torch.float32

    def push(step: int) -> None:
        state = unsharded_state(model.draft)
        context.main_only(lambda: pushed.push(directory, model.algorithm, state, step, dtype))

    return push


def resume_pushed(config: RunConfig, step: int) -> None:
    """Those who write are to find what they found after this step: the draft of the last hand-over before it, where it
    is still there, else none."""
    pushed.return_to(config.output / PUSHED, step - step % config.on_policy.push_every)


def _source(config: RunConfig) -> DraftSource | None:
    length = config.on_policy.draft_length
    return DraftSource(directory=config.output / PUSHED, length=length) if length else None
