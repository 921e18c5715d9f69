"""`eval --engine`: the draft in a real serving engine, the engine without it, and our decoder on the same prompts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from torchspec.cli.console import ProgressDisplay, counted, print_table
from torchspec.cli.schemas import EvalOptions
from torchspec.cli.target import Target, load_target
from torchspec.core import registry, settings
from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.lossless import Mismatch, Texts, find_mismatch, first_difference
from torchspec.core.decoding.measure import PromptLike
from torchspec.core.decoding.served import (
    OwnRun,
    ServedResult,
    ServedRun,
    ServeSettings,
    serve_prompts,
    served_acceptance,
    with_space,
)
from torchspec.core.decoding.speculative import decode
from torchspec.core.export.layout import CONFIG, FORMATS, ExportContext, read_draft, write_draft
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import EngineOptions, TargetSpec
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target, running_dtype


def evaluate_served(options: EvalOptions, prompts: Sequence[PromptLike], progress: ProgressDisplay) -> ServedResult:
    """Every engine is gone before the next is loaded: they may need the same memory."""
    assert options.engine is not None
    path = resolve_target(options.target)
    spec = read_target_spec(path, options.trust_remote_code)
    device = registry.load_device(registry.choose_device(options.device, settings.default_device())[0])
    asked = ServeSettings(
        max_new_tokens=options.max_new_tokens,
        draft_length=options.draft_length,
        temperature=options.temperature,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    kept = with_space(spec.max_position_embeddings, prompts, asked)
    engine = EngineOptions(
        target=path,
        device=device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        process=options.engine_config().process(),
    )
    with _draft(options.draft, spec, options.engine) as draft:
        run = _in_engine(options.engine, engine, draft.path, kept, asked, "with the draft", progress)
        plain = None
        if not options.engine_only:
            plain = _in_engine(options.engine, engine, None, kept, asked, "without it", progress)
        dtype = running_dtype(options.dtype, spec.dtype, device.runtime.bind(0))
        own: OwnRun | None = None
        mismatches: tuple[Mismatch, ...] = ()
        if not options.engine_only:
            with progress.phase("load target"):
                target = load_target(options)
            try:
                own = _own(target, draft, kept, asked, progress)
                mismatches = _mismatches(target, kept, run, plain, asked)
            finally:
                target.engine.close()
    acceptance = served_acceptance(run, asked.draft_length)
    expected = None if own is None else own.acceptance(asked.draft_length).length
    same = None if own is None or asked.temperature > 0 else own.same_rounds(run)
    speed = run.tokens / run.seconds
    slow = None if plain is None else plain.tokens / plain.seconds
    return ServedResult(
        engine=run.engine,
        engine_version=run.version,
        acceptance_length=acceptance.length,
        acceptance_per_position=acceptance.per_position or None,
        rounds=acceptance.rounds,
        drafted=acceptance.proposed,
        accepted=acceptance.accepted,
        tokens=run.tokens,
        tokens_per_second=speed,
        tokens_per_second_draftless=slow,
        speedup=None if slow is None else speed / slow,
        lossless=None if plain is None or asked.temperature > 0 else not mismatches,
        mismatches=mismatches,
        own_acceptance_length=expected,
        difference=None if expected is None else acceptance.length / expected - 1.0,
        same_rounds=None if same is None else same[0],
        compared_rounds=None if same is None else same[1],
        prompts=len(kept),
        skipped=len(prompts) - len(kept),
        draft_length=asked.draft_length,
        temperature=asked.temperature,
        max_new_tokens=asked.max_new_tokens,
        batch_size=asked.batch_size,
        seed=asked.seed,
        dtype=str(dtype).removeprefix("torch."),
    )


@dataclass(frozen=True, kw_only=True)
class Draft:
    """`path` is what an engine loads, `module` what our decoder runs: the trained one where there is a checkpoint, so
    that a mistake of the export shows."""

    path: Path
    algorithm: Algorithm
    module: nn.Module


@contextlib.contextmanager
def _draft(given: Path, target: TargetSpec, engine: str) -> Iterator[Draft]:
    """An exported draft as it is; of a run or a checkpoint, its draft in the layout that the engine reads."""
    if (given / CONFIG).is_file():
        algorithm, module = read_draft(given, target)
        yield Draft(path=given.resolve(), algorithm=algorithm, module=module)
        return
    from torchspec.core.pipeline.rebuild import find_checkpoint, rebuild, recorded_probe

    with tempfile.TemporaryDirectory(prefix="torchspec-draft-") as place:
        checkpoint = find_checkpoint(given)
        rebuilt = rebuild(checkpoint, target=target.path, trust_remote_code=target.trust_remote_code)
        written = Path(place) / "draft"
        probe = recorded_probe(checkpoint.parent.parent)
        context = ExportContext(head=rebuilt.head, device=registry.load_device("cpu"), probe=probe)
        layout = _layout(engine, rebuilt.algorithm.layouts)
        write_draft(rebuilt.algorithm, rebuilt.draft, layout, written, context)
        yield Draft(path=written, algorithm=rebuilt.algorithm, module=rebuilt.draft)


def _layout(engine: str, layouts: tuple[str, ...]) -> str:
    """The engine's own; of a draft that it cannot hold, the one that every engine reads."""
    wanted = FORMATS.get(engine, layouts[0])
    return wanted if wanted in layouts else FORMATS["hf"]


def _in_engine(
    name: str,
    options: EngineOptions,
    draft: Path | None,
    prompts: Sequence[PromptLike],
    asked: ServeSettings,
    how: str,
    progress: ProgressDisplay,
) -> ServedRun:
    with progress.phase(f"start {name} {how}"):
        engine = registry.load_serving(name, options, draft, asked.draft_length)
    try:
        return serve_prompts(engine, prompts, asked, stage=f"{name} {how}", progress=progress)
    finally:
        engine.close()


def _own(
    target: Target, draft: Draft, prompts: Sequence[PromptLike], asked: ServeSettings, progress: ProgressDisplay
) -> OwnRun:
    spec = target.engine.describe()
    head = load_target_head(
        target.path, dtype=target.dtype, device=target.torch_device, trust_remote_code=spec.trust_remote_code
    )
    module = draft.module.to(device=target.torch_device, dtype=target.dtype).eval()
    drafter = draft.algorithm.drafter(module, head, target.device)
    request = DecodeSettings(
        max_new_tokens=asked.max_new_tokens, draft_length=asked.draft_length, temperature=asked.temperature
    )
    generations = []
    for number, prompt in enumerate(prompts):
        ids = [int(token) for token in prompt.input_ids]
        generations += decode(target.engine, drafter, [ids], request, seed=asked.seed + number).generations
        progress("our own decoder", number + 1, len(prompts))
    return OwnRun(generations=generations)


def _mismatches(
    target: Target, prompts: Sequence[PromptLike], run: ServedRun, plain: ServedRun | None, asked: ServeSettings
) -> tuple[Mismatch, ...]:
    """Between the engine's texts with the draft and without; whether a tie explains it, the target's logits say."""
    if plain is None or asked.temperature > 0:
        return ()
    texts = (
        Texts(
            sample_id=prompt.sample_id,
            prompt=[int(token) for token in prompt.input_ids],
            tokens=with_draft.tokens,
            draftless=without.tokens,
        )
        for prompt, with_draft, without in zip(prompts, run.texts, plain.texts, strict=True)
    )
    found = (find_mismatch(target.engine, each, target.dtype) for each in texts if first_difference(each) is not None)
    return tuple(mismatch for mismatch in found if mismatch is not None)


def show(result: ServedResult) -> None:
    """The table, and under which conditions."""
    name = f"{result.engine} {result.engine_version}"
    rows = [
        (
            f"{name}, draft length {result.draft_length}",
            f"{result.acceptance_length:.3f}",
            f"{result.tokens_per_second:.1f}",
            "" if result.speedup is None else f"{result.speedup:.2f}x",
            _lossless(result),
        )
    ]
    if result.own_acceptance_length is not None:
        same = "" if result.same_rounds is None else f"{result.same_rounds} of {result.compared_rounds} texts alike"
        rows.append(("our own decoder", f"{result.own_acceptance_length:.3f}", "", "", same))
    if result.tokens_per_second_draftless is not None:
        rows.append((f"{name}, no draft", "1.000", f"{result.tokens_per_second_draftless:.1f}", "1.00x", ""))
    print_table("", ("", "acceptance length", "tokens/s", "speed-up", "lossless"), rows)
    if result.acceptance_per_position is not None:
        print_table(
            "acceptance per position (share of rounds that accept at least so many)",
            ("position", *(str(place + 1) for place in range(len(result.acceptance_per_position)))),
            [("accepted", *(f"{rate:.2f}" for rate in result.acceptance_per_position))],
        )
    how = "greedy" if result.temperature == 0 else f"temperature {result.temperature:g}"
    skipped = f", {result.skipped} left out for want of context" if result.skipped else ""
    print(
        f"{counted(result.prompts, 'prompt')}{skipped}, {counted(result.tokens, 'token')}, {how}, {result.dtype}, "
        f"batch {result.batch_size}"
    )


def _lossless(result: ServedResult) -> str:
    if result.lossless is None:
        return ""
    if result.lossless:
        return "yes"
    ties = sum(mismatch.tie for mismatch in result.mismatches)
    return f"no: {ties} ties, {len(result.mismatches) - ties} others"
