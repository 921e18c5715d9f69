"""What can be known of a run before anything heavy: everything that is wrong with it, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from torchspec.core import registry
from torchspec.core import settings as variables
from torchspec.core.config import environment
from torchspec.core.config.schema import RunConfig
from torchspec.core.data.chat import Renderer
from torchspec.core.data.messages import RowError
from torchspec.core.data.rows import ChatRow, RowReader
from torchspec.core.data.tokenizer import has_tokenizer, load_tokenizer
from torchspec.core.errors import CheckpointError, ConfigError, DataError, Problem, TorchspecError
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import DeviceSpec
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_outline import only_outlined, outline
from torchspec.core.models.target_spec import read_target_spec, resolve_target
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.assembly import initial_path
from torchspec.core.pipeline.device_fit import Ranks, backend_problems, device_problems, examined, precision_problems
from torchspec.core.pipeline.engine_setup import create_algorithm
from torchspec.core.pipeline.identity import known_facts
from torchspec.core.pipeline.offline import check_stored
from torchspec.core.pipeline.on_policy import on_policy_problems
from torchspec.core.pipeline.parallel_fit import parallel_problems
from torchspec.core.pipeline.plan_advice import memory_problems
from torchspec.core.pipeline.plan_load import Lengths, Subject, cached_lengths, lengths_of, subject_of
from torchspec.core.pipeline.rebuild import check_algorithm, initial_problems
from torchspec.core.pipeline.topology_fit import topology_problems, trainer_fraction
from torchspec.core.training.checkpoint import DRAFT, refuse_other_run
from torchspec.core.training.checkpoint_files import MANIFEST, directory_of, read_json, steps_on_disk

FIRST_ROWS = 100  # among which one conversation is looked for

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """`config` is what will be run: settings left at a default that does not fit the target are fitted to it, and
    `sources` says why, by the setting's path. `reader` has read nothing yet. `quantised`: what the engine makes of a
    target that is. `absent`: what the run needs and this machine lacks, a sentence each: only a plan goes without, and
    without a tokenizer only then."""

    config: RunConfig
    sources: dict[str, str]
    device: DeviceSpec
    target: TargetSpec
    weights: TargetWeights
    algorithm: Algorithm
    tokenizer: PreTrainedTokenizerBase | None
    reader: RowReader
    quantised: str | None = None
    absent: tuple[str, ...] = ()

    def subject(self, lengths: Lengths | None) -> Subject:
        """For planning the memory of this run and of others like it."""
        return subject_of(self.config, self.device, self.target, self.weights, self.algorithm, lengths)


class _Problems(list[Problem]):
    """Collects what is wrong, so that everything is reported at once."""

    def attempt(self, path: str, work: Callable[[], Found]) -> Found | None:
        """The result, or None with the failure noted under the setting it comes from."""
        try:
            return work()
        except ConfigError as error:
            self.extend(error.problems)
        except TorchspecError as error:
            self.append(Problem(field=path, message=str(error)))
        return None


def check(config: RunConfig, ranks: Ranks, *, to_run: bool = True, trains: bool = True) -> Checked:
    """Raises ConfigError with every problem found. Reads headers, configuration and the first rows of data.

    A run whose plan exceeds a given `train.memory_gb`, or what an engine leaves of a device that they share, is
    refused; a plan of it (`to_run` false) says so itself. A plan may be made elsewhere than the run: it needs neither
    device nor engine, and of the target its config.json alone. What does not train (`trains` false) has no run in its
    output, and sees to that directory itself.
    Needs no other rank: asked before any process waits for another.
    """
    problems = _Problems(environment.problems(config.model_dump(), planned=not to_run))
    absent = [] if to_run else [f"{each.field} {each.value} is {each.message}" for each in _absent(config)]
    device = problems.attempt("device", lambda: _device(config))
    if device is not None:
        problems += device_problems(config, device, ranks)
    backend = problems.attempt("backend", lambda: registry.backends().spec(config.backend))
    if backend is not None:
        problems += backend_problems(config, backend)
    refusal = run_dir.refusal(config) if trains else None
    if refusal is not None:
        problems.append(Problem(field="output", value=str(config.output), message=refusal))
    reader = problems.attempt("data.train", lambda: RowReader(config.data.train))
    if config.data.validation:
        problems.attempt("data.validation", lambda: RowReader(config.data.validation))

    target = weights = algorithm = tokenizer = quantised = None
    outlined = False
    sources: dict[str, str] = {}
    path = problems.attempt("target.path", lambda: resolve_target(config.target.path))
    if path is not None:
        if config.output.resolve() == path.resolve():
            message, remedy = "is the directory of the target", "name a directory for the run"
            problems.append(Problem(field="output", value=str(config.output), message=message, remedy=remedy))
        outlined = not to_run and only_outlined(path)
        if outlined:
            absent.append(f"{path} has no weights: what they take is worked out from config.json")
            weights = problems.attempt(
                "target.path", lambda: outline(path, trust_remote_code=config.target.trust_remote_code)
            )
        else:
            weights = problems.attempt("target.path", lambda: TargetWeights.open(path))
        if not to_run and not has_tokenizer(path):
            absent.append(f"{path} has no tokenizer: the chat template is not checked, no length is known")
        else:
            tokenizer = problems.attempt("target.path", lambda: _tokenizer(config, path))
        target = problems.attempt("target.path", lambda: read_target_spec(path, config.target.trust_remote_code))
    if target is not None:
        if weights is not None and not outlined:
            problems.attempt("target.path", lambda: _check_head(target))
        if weights is not None and not outlined and backend is not None and config.pipeline.topology != "offline":
            quantised = problems.attempt("target.path", lambda: examined(backend, target))
        start = _start(config, problems)
        if start is None or _fits_start(config, start, target, problems):
            algorithm = problems.attempt("draft", lambda: create_algorithm(config, target))
        if start is not None and algorithm is not None:
            problems += problems.attempt("draft.init_from", lambda: initial_problems(start, algorithm, target)) or []
        config, sources = _fit_length(config, target, problems)
    problems += precision_problems(config.precision, several=ranks.all > 1)
    problems += topology_problems(config, device, backend)
    problems += on_policy_problems(config, backend)
    problems += parallel_problems(config, ranks.all, algorithm=algorithm, backend=backend, target=target)
    if tokenizer is not None:
        own = config.target.chat_template is None
        problems.attempt("target.path" if own else "target.chat_template", lambda: _check_template(config, tokenizer))
    resumes = trains and refusal is None
    if resumes and target is not None and algorithm is not None and tokenizer is not None and not outlined:
        problems.attempt("output", lambda: _check_resumable(config, algorithm, target, tokenizer))
    if not problems and config.pipeline.topology == "offline" and tokenizer is not None and not outlined:
        assert device is not None
        assert target is not None
        assert algorithm is not None
        kind = torch.device(device.device_type)
        problems.attempt("pipeline.features", lambda: check_stored(config, algorithm, target, tokenizer, kind))

    if problems:
        raise ConfigError([problem for n, problem in enumerate(problems) if problem not in problems[:n]])
    assert device is not None
    assert target is not None
    assert weights is not None
    assert algorithm is not None
    assert reader is not None
    checked = Checked(
        config=config, sources=sources, device=device, target=target, weights=weights, algorithm=algorithm,
        tokenizer=tokenizer, reader=reader, quantised=quantised, absent=tuple(absent),
    )  # fmt: skip
    shared = trainer_fraction(config, device.device_type) < 1
    if to_run and (shared or config.train.memory_gb is not None):
        lengths = lengths_of(cached_lengths(config, reader, tokenizer))
        too_large = memory_problems(config, ranks, checked.subject(lengths))
        if too_large:
            raise ConfigError(too_large)
    return checked


def _absent(config: RunConfig) -> list[Problem]:
    """Why the device and the engine cannot be used here; that there is none of such a name is a problem of its own."""
    tree = config.model_dump()
    return environment.absent_adapters(tree) if not environment.unknown_adapters(tree) else []


def _device(config: RunConfig) -> DeviceSpec:
    name, _ = registry.choose_device(config.device, variables.default_device())
    return registry.devices().spec(name)


def _tokenizer(config: RunConfig, target: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        target,
        chat_template=config.target.chat_template,
        trust_remote_code=config.target.trust_remote_code,
        thinking=config.target.thinking,
    )


def _check_head(target: TargetSpec) -> None:
    """Names, shapes and kinds of the tensors that training reads itself: onto the meta device comes no value."""
    load_target_head(
        target.path,
        dtype=torch.float32,
        device=torch.device("meta"),
        trust_remote_code=target.trust_remote_code,
    )


def _check_template(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """One of the first conversations rendered; rows that the template refuses are for the report on the data."""
    renderer = Renderer(tokenizer)
    for files, prepare in (
        (config.data.train, renderer.prompt if config.on_policy.enabled else renderer.prepare),
        (config.data.validation, renderer.prompt),
    ):
        row = _first_conversation(files)
        if row is not None:
            with suppress(RowError):
                prepare(row)


def _first_conversation(files: Sequence[Path]) -> ChatRow | None:
    with suppress(DataError, OSError):  # files that cannot be read are reported elsewhere
        return next((row for row in islice(RowReader(files), FIRST_ROWS) if isinstance(row, ChatRow)), None)
    return None


def _check_resumable(
    config: RunConfig, algorithm: Algorithm, target: TargetSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises CheckpointError when the checkpoint in the output directory is of another run, as far as is known yet."""
    checkpoints = config.output / run_dir.CHECKPOINTS
    steps = steps_on_disk(checkpoints)
    if not steps:
        return
    newest = directory_of(checkpoints, steps[-1])
    try:
        saved = read_json(newest / DRAFT)
    except CheckpointError:
        return  # a damaged one is passed over when the run starts
    refuse_other_run(newest, saved, known_facts(config, algorithm, target, tokenizer, saved))


def _start(config: RunConfig, problems: _Problems) -> Path | None:
    """What the draft's first weights are read from. A run that continues has its weights already: what it once started
    from may be gone."""
    path = initial_path(config)
    if path is None or steps_on_disk(config.output / run_dir.CHECKPOINTS):
        return None
    known = ("config.json", MANIFEST, "checkpoints")
    if any((path / name).exists() for name in known) or steps_on_disk(path):
        return path
    message = "is neither an exported draft nor a checkpoint nor a run directory"
    problems.append(Problem(field="draft.init_from", value=str(path), message=message))
    return None


def _fits_start(config: RunConfig, start: Path, target: TargetSpec, problems: _Problems) -> bool:
    """Of another algorithm's draft nothing else needs to be said: its config.json would be read for what it is not."""
    found = problems.attempt("draft.init_from", lambda: check_algorithm(start, config.algorithm, target))
    return found is not None


def _fit_length(config: RunConfig, target: TargetSpec, problems: _Problems) -> tuple[RunConfig, dict[str, str]]:
    """data.max_length within the target's context: a default is cut to it, a value of the user's is refused."""
    context = target.max_position_embeddings
    if config.data.max_length <= context:
        return config, {}
    if "max_length" in config.data.model_fields_set:
        problems.append(
            Problem(
                field="data.max_length",
                value=config.data.max_length,
                message=f"the target reads at most {context} tokens (max_position_embeddings in its config.json)",
                remedy=f"give data.max_length={context} or less, or leave it out",
            )
        )
        return config, {}
    data = config.data.model_copy(update={"max_length": context})
    return config.model_copy(update={"data": data}), {"data.max_length": "the target's context"}
