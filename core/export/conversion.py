"""A draft's directory turned into another layout, nothing trained: read, written, and compared both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.layout import (
    FORMATS,
    ExportContext,
    Recognised,
    read_draft,
    recognise,
    stored_state,
    write_draft,
)
from torchspec.core.export.selfcheck import SelfCheck, check_files
from torchspec.core.interfaces.algorithm import Algorithm, DraftFiles
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Read:
    """A recognised draft in memory, float32 on the CPU."""

    directory: Path
    target: TargetSpec
    found: Recognised
    algorithm: Algorithm
    draft: nn.Module

    @classmethod
    def of(cls, directory: Path, target: TargetSpec) -> Read:
        """Raises CheckpointError for a directory that is no draft of this target's."""
        found = recognise(directory, target)
        algorithm, draft = found.spec.from_files(found.files, target)
        return cls(directory=directory, target=target, found=found, algorithm=algorithm, draft=draft.float())


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """source   how far an engine's reading of the directory that was read is from the draft; None where its layout is
    none that engines serve such a draft from as it was trained (a note says why)
    outcome     the same of the directory that was written
    dtype       of the stored tensors
    """

    source: SelfCheck | None
    outcome: SelfCheck
    dtype: torch.dtype


def convert(read: Read, layout: str, output: Path, context: ExportContext, dtype: torch.dtype | None) -> Conversion:
    """Write the draft in `layout`; `dtype` None: as it was stored.

    Raises ConfigError where the layout cannot hold it, and CheckpointError, with nothing put in place, where an engine
    would compute something else from either directory, or where the written one is read as another draft.
    """
    algorithm, draft = read.algorithm, read.draft
    dtype = dtype or stored_dtype(read.found.files)
    source = check_source(read, context)

    def same_again(written: Path) -> None:
        other = differences(read, written, stored_state(draft.state_dict(), dtype))
        if other:
            raise CheckpointError(f"the written draft is read as another one than {read.directory}: {', '.join(other)}")

    outcome = write_draft(algorithm, draft, layout, output, context, dtype, also=same_again)
    return Conversion(source=source, outcome=outcome, dtype=dtype)


def differences(read: Read, written: Path, expected: Mapping[str, Tensor]) -> list[str]:
    """Settings and tensors in which the draft of another directory is not the one that was read, whose stored tensors
    are `expected`."""
    again, loaded = read_draft(written, read.target)
    theirs, ours = asdict(again.geometry), asdict(read.algorithm.geometry)
    found = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    found += [] if again.taps == read.algorithm.taps else ["taps"]
    state = loaded.state_dict()
    found += sorted(state.keys() ^ expected.keys())
    shared = [name for name in state if name in expected]
    return found + [name for name in shared if not torch.equal(state[name], expected[name].to(state[name].dtype))]


def check_source(read: Read, context: ExportContext) -> SelfCheck | None:
    """Whether an engine computes the draft from the directory that was read. Raises CheckpointError."""
    if read.found.layout not in read.algorithm.layouts:
        return None
    files = _of_one_dtype(_with_targets_own(read, context.head))
    try:
        return check_files(read.algorithm, read.draft, files, context.head, context.device, context.probe)
    except CheckpointError as error:
        raise CheckpointError(
            f"{read.directory} is not what it seems: an engine would compute another draft from it than the one that "
            f"was read. {error}"
        ) from error


def stored_dtype(files: DraftFiles) -> torch.dtype:
    """Of the floating-point tensors; of several the widest."""
    kinds = {tensor.dtype for tensor in files.tensors.values() if tensor.is_floating_point()}
    widest = torch.float32 if len(kinds) > 1 else next(iter(kinds), torch.float32)
    return torch.float32 if widest == torch.float64 else widest


def refusals(read: Read) -> dict[str, str]:
    """Of each layout that cannot hold the draft, why."""
    found = {}
    for layout in dict.fromkeys(FORMATS.values()):
        if layout in read.algorithm.layouts:
            continue
        try:
            read.algorithm.to_files(stored_state(read.draft.state_dict(), torch.float32), layout)
        except ConfigError as error:
            found[layout] = "; ".join(str(problem) for problem in error.problems)
    return found


def _with_targets_own(read: Read, head: TargetHead) -> DraftFiles:
    """The files that were read, with the target's embedding and head in place of copies that the draft does not train:
    they were compared when it was read, and may be stored in another precision."""
    tensors, own = dict(read.found.files.tensors), read.draft.state_dict()
    if EMBEDDING in tensors and EMBEDDING not in own:
        del tensors[EMBEDDING]
    if HEAD in tensors and HEAD not in own:
        ids_N = torch.arange(len(tensors[HEAD])) + tensors.get("d2t", torch.tensor(0))
        tensors[HEAD] = head.rows(ids_N)
    return replace(read.found.files, tensors=tensors)


def _of_one_dtype(files: DraftFiles) -> DraftFiles:
    dtype = stored_dtype(files)
    return replace(
        files,
        tensors={name: t.to(dtype) if t.is_floating_point() else t for name, t in files.tensors.items()},
    )
