"""`torchspec convert`: a published draft in another layout, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from torchspec.cli.console import announce
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.core.config.schema import Section
from torchspec.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch

    from torchspec.core.export.conversion import Read
    from torchspec.core.export.layout import ExportContext, Recognised
    from torchspec.core.export.selfcheck import SelfCheck
    from torchspec.core.interfaces.engine import TargetSpec


class ConvertOptions(Section):
    draft: Path = Field(description="a draft's directory in any layout that is read (docs/checkpoints.md)")
    target: Path | None = Field(None, description="directory of its target; with --dry-run it may be left out")
    format: Literal["hf", "sglang", "vllm"] | None = Field(
        None,
        description="hf and sglang: the algorithm's plain layout, mostly read by vLLM, too; vllm: the speculators one",
    )
    output: Path | None = Field(None, description="the directory to write; an earlier draft there is replaced")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="precision of the stored tensors; default: the draft's own"
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the target's directory")
    dry_run: bool = Field(False, description="say what the draft is and which layouts can hold it, and write nothing")


def parser() -> Parser:
    made = Parser(
        "convert",
        "Turn a draft that somebody published into another layout, without training, and check it: what an engine\n"
        "computes from either directory must be what the draft computes, and the written one must be read as the same.",
    )
    add_options(made, ConvertOptions, all_flags(ConvertOptions))
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), ConvertOptions, words)
    _check(options)
    announce(f"torchspec convert: reading {options.draft}")

    from torchspec.core.export.conversion import Read, convert
    from torchspec.core.export.layout import FORMATS, recognise
    from torchspec.core.pipeline.card import converted_facts

    if options.target is None:
        print("\n".join(_stored(options.draft, recognise(options.draft))))
        print(
            "  with --target: sizes and taps, which layouts can hold it, and a check of what an engine computes from it"
        )
        return 0
    target = _target(options)
    read = Read.of(options.draft, target)
    print("\n".join((*_stored(options.draft, read.found), *_fitted(read))))
    context = _context(target)
    if options.dry_run:
        _dry(read, context)
        return 0
    assert options.format is not None
    assert options.output is not None
    context = replace(context, card=converted_facts(read.algorithm, target, options.draft))
    done = convert(read, FORMATS[options.format], options.output, context, _dtype(options.dtype))
    _say(options.draft, done.source)
    _say(options.output, done.outcome)
    print(f"{options.output}: read again, it is the same draft, tensor by tensor, in {_name(done.dtype)}")
    return 0


def _check(options: ConvertOptions) -> None:
    """ConfigError with everything that is missing."""
    from torchspec.core.config import environment

    needed = {} if options.dry_run else {name: getattr(options, name) for name in ("target", "format", "output")}
    problems = [
        Problem(field=f"--{name}", message="required", remedy=f"give --{name}, or --dry-run")
        for name, value in needed.items()
        if value is None
    ]
    if options.output is not None and not options.dry_run:
        problems += environment.output_problems("--output", options.output.parent)
    if problems:
        raise ConfigError(problems)
    if options.output is not None and not options.dry_run:
        from torchspec.core.export.layout import check_replaceable

        check_replaceable(options.output)


def _target(options: ConvertOptions) -> TargetSpec:
    from torchspec.core.models.target_spec import read_target_spec, resolve_target

    assert options.target is not None
    return read_target_spec(resolve_target(options.target), options.trust_remote_code)


def _context(target: TargetSpec) -> ExportContext:
    import torch

    from torchspec.core import registry
    from torchspec.core.export.layout import ExportContext
    from torchspec.core.models.target_head import load_target_head

    head = load_target_head(
        target.path, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=target.trust_remote_code
    )
    return ExportContext(head=head, device=registry.load_device("cpu"))


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    made: torch.dtype | None = None if name is None else getattr(torch, name)
    return made


def _stored(directory: Path, found: Recognised) -> Iterator[str]:
    """What is there, before a target is known."""
    tensors = found.files.tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    kinds = sorted({_name(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()})
    yield f"{directory}: a draft of {found.spec.name} in the {found.layout} layout"
    yield f"  stored     {', '.join(found.stored)}: {len(tensors)} tensors, {size / 1e6:.1f} MB, {', '.join(kinds)}"
    yield from (f"  read       {note}" for note in found.files.notes)


def _fitted(read: Read) -> Iterator[str]:
    """What is known with the target."""
    algorithm, parameters = read.algorithm, sum(p.numel() for p in read.draft.parameters())
    yield f"  draft      {parameters:,} parameters, taps {list(algorithm.taps)}, {algorithm.vocabulary_size} tokens"
    yield from (f"  setting    {name}: {value}" for name, value in asdict(algorithm.geometry).items())


def _dry(read: Read, context: ExportContext) -> None:
    from torchspec.core.export.conversion import check_source, refusals
    from torchspec.core.export.layout import FORMATS

    for layout in read.algorithm.layouts:
        names = [name for name, each in FORMATS.items() if each == layout]
        print(f"  fits       the {layout} layout: --format {' or '.join(names) if names else layout}")
    for layout, reason in refusals(read).items():
        print(f"  does not   fit the {layout} layout: {reason}")
    _say(read.directory, check_source(read, context))


def _say(directory: Path, check: SelfCheck | None) -> None:
    if check is None:
        print(f"{directory}: not compared: no engine serves such a draft from this layout as it was trained")
        return
    print(
        f"{directory}: what an engine computes from it is at most {check.total_variation:.1e} from the draft (total "
        f"variation over {check.drafted} drafted tokens, limit {check.limit:.0e})"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
