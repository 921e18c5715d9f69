"""Measuring a draft for `eval` and `quickstart`: which ways of decoding are compared, eval.json, the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchspec.cli.console import ProgressDisplay, counted, print_table, write_whole
from torchspec.cli.target import Target
from torchspec.core.decoding.evaluate import EvalResult, EvalSettings, Variant, best_length, compare
from torchspec.core.decoding.measure import PromptLike
from torchspec.core.decoding.prompt_lookup import PromptLookupDrafter
from torchspec.core.decoding.samples import prompts_digest, samples
from torchspec.core.errors import CheckpointError
from torchspec.core.export.layout import CONFIG, read_draft
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_head import load_target_head

# Of a result in a sweep; the rest is common to all of them.
_SWEPT = (
    "draft_length", "acceptance_length", "acceptance_per_position", "tokens_per_second",
    "tokens_per_second_draftless", "speedup", "speedup_median", "lossless", "longest_draft",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`result` at the draft length asked for; the others were measured side by side with it."""

    result: EvalResult
    sweep: dict[int, EvalResult]
    prompt_lookup: EvalResult | None
    samples: Sequence[dict[str, Any]] = ()

    @property
    def best_draft_length(self) -> int:
        """The fastest chain length measured."""
        return best_length(self.sweep)

    def to_json(self) -> dict[str, Any]:
        """eval.json: the result's own keys, `sweep`, `best_draft_length`, `prompts_digest`, `samples` of decoded texts
        (`core.decoding.samples`) and, if measured, `prompt_lookup`."""
        values = self.result.to_json()
        values["sweep"] = [_figures(result) for _, result in sorted(self.sweep.items())]
        values["best_draft_length"] = self.best_draft_length
        values["prompts_digest"] = prompts_digest(self.result.records)
        values["samples"] = list(self.samples)
        if self.prompt_lookup is not None:
            values["prompt_lookup"] = _figures(self.prompt_lookup)
        return values

    def write(self, path: Path) -> None:
        """eval.json, whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), indent=2) + "\n")


def _figures(result: EvalResult) -> dict[str, Any]:
    values = result.to_json()
    return {name: values[name] for name in _SWEPT}


def evaluate_draft(
    target: Target,
    draft: Path,
    prompts: Sequence[PromptLike],
    settings: EvalSettings,
    progress: ProgressDisplay,
    *,
    lengths: Sequence[int] = (),
    prompt_lookup: bool = False,
) -> Evaluation:
    """Decode the prompts with the draft at every length, with n-gram drafting if asked, and without a draft."""
    spec = target.engine.describe()
    algorithm, module = _draft(draft, spec)
    module = module.to(device=target.torch_device, dtype=target.dtype).eval()
    head = load_target_head(
        target.path, dtype=target.dtype, device=target.torch_device, trust_remote_code=spec.trust_remote_code
    )
    drafter = algorithm.drafter(module, head, target.device)
    wanted = sorted({settings.draft_length, *lengths})
    variants = {f"draft {length}": Variant(drafter=drafter, draft_length=length) for length in wanted}
    if prompt_lookup:
        variants["lookup"] = Variant(drafter=PromptLookupDrafter(), draft_length=settings.draft_length)
    results = compare(target.engine, variants, prompts, settings, progress=progress)
    sweep = {length: results[f"draft {length}"] for length in wanted}
    result = sweep[settings.draft_length]
    texts = samples(
        result.records, lambda ids: str(target.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    )
    return Evaluation(result=result, sweep=sweep, prompt_lookup=results.get("lookup"), samples=texts)


def _draft(given: Path, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    """An exported draft, or that of a run or a checkpoint as it was trained."""
    if (given / CONFIG).is_file():
        return read_draft(given, target)
    from torchspec.core.pipeline.rebuild import find_checkpoint, rebuild

    try:
        checkpoint = find_checkpoint(given)
    except CheckpointError as error:
        raise CheckpointError(f"{given} has no {CONFIG}, so it is no exported draft; and {error}") from error
    rebuilt = rebuild(checkpoint, target=target.path, trust_remote_code=target.trust_remote_code)
    return rebuilt.algorithm, rebuilt.draft


def show(evaluation: Evaluation) -> None:
    """The table a run ends with, and what its figures are."""
    result = evaluation.result
    best = evaluation.best_draft_length
    rows = [
        _row(f"draft length {length}" + (" (fastest)" if length == best and len(evaluation.sweep) > 1 else ""), item)
        for length, item in sorted(evaluation.sweep.items())
    ]
    if evaluation.prompt_lookup is not None:
        rows.append(_row(f"prompt lookup, {evaluation.prompt_lookup.draft_length}", evaluation.prompt_lookup))
    if result.tokens_per_second_draftless is not None:
        rows.append(("no draft", "1.00", f"{result.tokens_per_second_draftless:.1f}", "1.00x", ""))
    print_table("", ("", "acceptance length", "tokens/s", "speed-up", "lossless"), rows)
    positions = [f"{rate:.2f}" for rate in result.acceptance_per_position]
    print_table(
        f"acceptance per position, draft length {result.draft_length} (share of rounds that accept at least so many)",
        ("position", *(str(place + 1) for place in range(len(positions)))),
        [("accepted", *positions)],
    )
    for length, item in sorted(evaluation.sweep.items()):
        if item.rounds and item.longest_draft < length:
            print(f"draft length {length}: no round drafted more than {item.longest_draft}, all that the draft has")
    print(_conditions(result))


def _row(name: str, result: EvalResult) -> tuple[str, ...]:
    return (
        name,
        f"{result.acceptance_length:.2f}",
        f"{result.tokens_per_second:.1f}",
        "" if result.speedup is None else f"{result.speedup:.2f}x",
        _lossless(result),
    )


def _lossless(result: EvalResult) -> str:
    if result.lossless is None:
        return ""
    if result.lossless:
        return "yes"
    return f"no: {result.tie_mismatches} ties, {result.other_mismatches} others"


def _conditions(result: EvalResult) -> str:
    how = "greedy" if result.temperature == 0 else f"temperature {result.temperature:g}"
    machine = result.machine
    decoded = f"{counted(result.prompts, 'prompt')}, {counted(result.tokens, 'token')}"
    return (
        f"{decoded}, {how}, batch {result.batch_size}, {result.dtype}, {machine['device_name'] or machine['device']}, "
        f"{counted(machine['threads'], 'thread')}, torch {machine['torch']}"
    )
