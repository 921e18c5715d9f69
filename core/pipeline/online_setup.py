"""What an `OnlineDraftTrainer` is made of: its settings, everything that is wrong with them at once, and its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from torchspec.core import registry
from torchspec.core.config.environment import adapter_problems, default_device
from torchspec.core.config.load import check_values
from torchspec.core.config.schema import Positive, PrecisionConfig, RunConfig, Section, Seed, TrainConfig
from torchspec.core.data.vocabulary import build_vocabulary
from torchspec.core.errors import ConfigError, Problem, TargetError, TorchspecError
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import SafetensorsTargetHead, load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target, running_dtype, target_spec
from torchspec.core.models.target_tensors import TargetTensors, make_target_head
from torchspec.core.objectives.terms import Course
from torchspec.core.ops.given import no_numbers
from torchspec.core.parallel.ranks import GivenRanks
from torchspec.core.pipeline.assembly import step_memory
from torchspec.core.pipeline.device_fit import Ranks as RankCounts
from torchspec.core.pipeline.device_fit import device_problems, precision_problems
from torchspec.core.pipeline.engine_setup import algorithm_of
from torchspec.core.pipeline.rebuild import check_algorithm, initial_problems, load_state, read_initial
from torchspec.core.training.capturing import Model
from torchspec.core.training.fp8 import Fp8Compute, emulation, gathering_of, scaling_of
from torchspec.core.training.low_bit import check_low_bit
from torchspec.core.training.sharding import COMPUTE, shard_draft

logger = logging.getLogger(__name__)

LOOP = (
    "epochs", "memory_gb", "log_every", "trackers", "project", "profile_step", "checkpoint_every", "keep_last",
    "resume", "warmup_ratio",
)  # fmt: skip
"""Settings of `train` that belong to who owns the loop."""

Found = TypeVar("Found")


class OnlineTrainConfig(TrainConfig):
    schedule: Literal["cosine", "wsd", "constant"] = Field("constant", description="learning rate after warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="linear warm-up, in optimizer steps")
    batch_tokens: Positive | None = Field(
        None, description="a window takes samples until they have so many tokens, in place of batch_size"
    )


class OnlineTargetConfig(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of hidden states, embedding and head; auto: as stored, float32 on a CPU"
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the target's directory")


class HoldConfig(Section):
    """Samples that wait for a step."""

    budget_mb: Positive = Field(2000, description="bytes of their features, in 1e6 bytes")
    when_full: Literal["refuse", "drop_oldest"] = Field(
        "refuse", description="refuse the sample that does not fit, or drop those held longest"
    )
    place: Literal["device", "host"] = Field("device", description="where their features are kept")


class OnlineConfig(Section):
    device: str | None = Field(None, description="cpu, cuda, npu or a plug-in's name, or NAME:N; default: what is here")
    algorithm: str = Field("eagle3", description="draft algorithm")
    seed: Seed = Field(0, description="seeds initialisation and what is drawn at random")
    patience: float = Field(600, gt=0, description="seconds that a step waits for the other ranks to come")
    target: OnlineTargetConfig = Field(default_factory=lambda: OnlineTargetConfig())
    train: OnlineTrainConfig = Field(default_factory=lambda: OnlineTrainConfig())
    precision: PrecisionConfig = Field(default_factory=lambda: PrecisionConfig())
    hold: HoldConfig = Field(default_factory=lambda: HoldConfig())

    draft: Any = None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Settings that fit each other, and what they name. `initial`: weights to start from, if any."""

    config: OnlineConfig
    device: Device
    torch_device: torch.device
    target: TargetSpec
    algorithm: Algorithm
    vocabulary: VocabularyMap
    initial: dict[str, Tensor] | None

    @property
    def target_dtype(self) -> torch.dtype:
        return running_dtype(self.config.target.dtype, self.target.dtype, self.torch_device)


OnlineTarget = str | Path | TargetTensors | PreTrainedModel


def check_online(
    target: OnlineTarget, values: Mapping[str, Any], token_counts_V: Tensor | None, group: object
) -> Checked:
    """Raises ConfigError with every problem found. No weight of the target is read yet."""
    config, problems = check_values(values, OnlineConfig)
    if not isinstance(group, ProcessGroup | None):
        message = f"is of type {type(group).__name__}, expected a process group that this rank belongs to"
        remedy = "give what torch.distributed.new_group returned on a rank of it, or leave it out"
        problems.append(Problem(field="group", message=message, remedy=remedy))

    def attempt(field: str, work: Callable[[], Found]) -> Found | None:
        try:
            return work()
        except ConfigError as error:
            problems.extend(error.problems)
        except TorchspecError as error:
            problems.append(Problem(field=field, message=str(error)))
        return None

    trusted = config is not None and config.target.trust_remote_code
    spec = attempt("target", lambda: _spec(target, trust_remote_code=trusted))
    if config is None:
        raise ConfigError(problems)
    grouped = group is not None
    problems += [*_train_problems(config, grouped=grouped), *_length_problems(config)]
    device = attempt("device", lambda: _device(config, problems, grouped=grouped))
    if config.train.optimizer == "adamw8bit":
        attempt("train.optimizer", check_low_bit)
    algorithm = vocabulary = initial = None
    path: Path | None = getattr(config.draft, "init_from", None)
    if spec is not None and (
        path is None or attempt("draft.init_from", lambda: check_algorithm(path, config.algorithm, spec)) is not None
    ):
        algorithm = attempt("draft", lambda: algorithm_of(config.algorithm, config.draft, spec))
    if spec is not None and algorithm is not None:
        if path is not None:
            problems += attempt("draft.init_from", lambda: initial_problems(path, algorithm, spec)) or []
            initial = attempt("draft.init_from", lambda: read_initial(path, spec))
        vocabulary = attempt("draft.vocab_size", lambda: _vocabulary(algorithm, spec, token_counts_V, initial))
    if problems:
        raise ConfigError([problem for n, problem in enumerate(problems) if problem not in problems[:n]])
    assert spec is not None
    assert device is not None
    assert algorithm is not None
    assert vocabulary is not None
    return Checked(
        config=config,
        device=device[0],
        torch_device=device[1],
        target=spec,
        algorithm=algorithm,
        vocabulary=vocabulary,
        initial=None if initial is None else initial[0],
    )


def _spec(target: OnlineTarget, *, trust_remote_code: bool) -> TargetSpec:
    if isinstance(target, str | Path):
        return read_target_spec(resolve_target(target), trust_remote_code)
    tensors = TargetTensors.of(target) if isinstance(target, PreTrainedModel) else target
    if not isinstance(tensors, TargetTensors):
        raise TargetError(
            f"is a {type(target).__name__}, expected a directory, a model of transformers or torchspec.TargetTensors"
        )
    return target_spec(tensors.config, tensors.path or Path("target"))


def _train_problems(config: OnlineConfig, *, grouped: bool) -> Iterator[Problem]:
    train = config.train
    given = train.model_fields_set
    for name in sorted(given.intersection(LOOP)):
        yield Problem(field=f"train.{name}", message="is for who owns the loop, and here you do", remedy="leave it out")
    for name, other in (("batch_tokens", "batch_size"), ("tokens_per_rank", "micro_batch_size")):
        if getattr(train, name) is not None and other in given:
            remedy = "leave one of the two out"
            yield Problem(field=f"train.{other}", message=f"means nothing with train.{name}", remedy=remedy)
    if train.offload in ("states", "all") and not grouped:
        message, remedy = "needs a process group, over which the draft is sharded", "give group=..."
        yield Problem(field="train.offload", value=train.offload, message=message, remedy=remedy)


def _length_problems(config: OnlineConfig) -> Iterator[Problem]:
    """What is said in shares of a training whose length nobody has said."""
    if config.train.max_steps is not None:
        return
    message, remedy = "depends on how many steps there will be", "give train.max_steps"
    if config.train.schedule != "constant":
        value = config.train.schedule
        yield Problem(field="train.schedule", value=value, message=message, remedy=f"{remedy}, or constant")
    for name in type(config.draft).model_fields:
        value = getattr(config.draft, name)
        each = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(one, Course) and one.start != one.end for one in each):
            yield Problem(
                field=f"draft.{name}", message=message, remedy=f"{remedy}, or let it be the same from start to end"
            )


def _device(config: OnlineConfig, problems: list[Problem], *, grouped: bool) -> tuple[Device, torch.device] | None:
    name, _, number = (config.device or default_device()[0]).partition(":")
    found = adapter_problems("device", name, registry.devices())
    if number and not number.isdecimal():
        found.append(Problem(field="device", value=config.device, message="must be a name, or name:number"))
    sections: dict[str, Any] = {"device": name, "precision": config.precision, "train": config.train}
    run = RunConfig.model_construct(**sections)
    problems += found + precision_problems(config.precision, several=grouped)
    if found:
        return None
    problems += device_problems(run, registry.devices().spec(name), RankCounts())
    device = registry.load_device(name)
    kind = device.runtime.device_type
    if kind == "cpu":
        if number:
            message, remedy = "CPUs have no numbers", "give cpu"
            problems.append(Problem(field="device", value=config.device, message=message, remedy=remedy))
        return device, torch.device(kind)
    index = int(number) if number else int(torch.get_device_module(kind).current_device())
    if index >= device.runtime.device_count():
        message = f"there are {device.runtime.device_count()} such devices"
        problems.append(Problem(field="device", value=config.device, message=message))
    return device, torch.device(kind, index)


def _vocabulary(
    algorithm: Algorithm,
    target: TargetSpec,
    token_counts_V: Tensor | None,
    initial: tuple[dict[str, Tensor], VocabularyMap] | None,
) -> VocabularyMap:
    """The draft's: that of the draft it starts from, all of the target's, or the tokens that are used most."""
    if initial is not None:
        return initial[1]
    size = algorithm.vocabulary_size
    if size == target.vocab_size:
        return VocabularyMap.identity(size)
    if token_counts_V is not None and (wrong := _miscounted(token_counts_V, target.vocab_size)):
        raise ConfigError([Problem(field="token_counts", message=wrong)])
    if token_counts_V is not None and bool(token_counts_V.any()):
        return build_vocabulary(token_counts_V.detach().cpu().long(), size, target.vocab_size)
    problem = Problem(
        field="draft.vocab_size",
        value=size,
        message=f"which {size} of the target's {target.vocab_size} tokens the draft should know is decided by how "
        "often each is used, and nobody has counted",
        remedy=f"give token_counts (int64, one count for each id), or draft.vocab_size={target.vocab_size}",
    )
    raise ConfigError([problem])


def _miscounted(counts_V: object, vocabulary: int) -> str:
    """What is wrong with them, or "". A tokenizer may know fewer ids than the target has: those have no counts."""
    if (fault := no_numbers(counts_V)) is not None:
        return fault
    assert isinstance(counts_V, Tensor)
    if counts_V.ndim != 1 or counts_V.numel() > vocabulary:
        return f"has shape {list(counts_V.shape)}, expected [{vocabulary}], one count for each id"
    if not bool((torch.isfinite(counts_V) & (counts_V >= 0)).all()):
        return "has counts below 0, or that are no numbers"
    return ""


def load_ends(target: OnlineTarget, checked: Checked) -> SafetensorsTargetHead:
    """The target's embedding, norm and head on the training's device, in tensors of its own."""
    place: dict[str, Any] = {"dtype": checked.target_dtype, "device": checked.torch_device}
    if isinstance(target, str | Path):
        trusted = checked.config.target.trust_remote_code
        return load_target_head(checked.target.path, trust_remote_code=trusted, **place)
    return make_target_head(TargetTensors.of(target) if isinstance(target, PreTrainedModel) else target, **place)


def build_online_model(checked: Checked, head: SafetensorsTargetHead, ranks: GivenRanks) -> Model:
    """The draft as `torchspec train` starts it from the same random state."""
    config = checked.config
    draft = checked.algorithm.build_draft(checked.vocabulary, head)
    if checked.initial is not None:
        load_state(draft, checked.initial, config.draft.init_from)
    offload, compute = config.train.offload, config.precision.compute
    if compute == "fp8" and (emulated := emulation(ranks.device)) is not None:
        logger.warning(emulated)
    if ranks.group is None:
        draft.to(checked.torch_device)
    else:
        gather = gathering_of(config.precision, ranks.size)
        shard_draft(draft, ranks, compute, states_on_host=offload in ("states", "all"), gather=gather)
    return Model(
        algorithm=checked.algorithm,
        draft=draft,
        head=head,
        engine=None,
        memory=step_memory(config.train),
        offload_activations=offload in ("activations", "all"),
        cast=COMPUTE[compute] if ranks.group is None else None,
        fp8=Fp8Compute(scaling=scaling_of(config.precision)) if compute == "fp8" else None,
    )
