"""The parts of a run, loaded and fitted together on one rank."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from torchspec.core import registry, settings
from torchspec.core.config.schema import RunConfig, TrainConfig
from torchspec.core.data.dataset import DatasetSettings, Prompt, TokenDataset, load_dataset, load_prompts
from torchspec.core.data.vocabulary import build_vocabulary, coverage
from torchspec.core.decoding.measure import with_room
from torchspec.core.interfaces.algorithm import Algorithm, StepMemory
from torchspec.core.interfaces.engine import TargetEngine, TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import load_target_head, load_target_head_shard
from torchspec.core.models.target_quantisation import described as described_quantisation
from torchspec.core.models.target_spec import read_target_spec, resolve_target, running_dtype
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.pipeline.engine_setup import ENGINE, check_images, engine_options
from torchspec.core.pipeline.identity import draft_facts
from torchspec.core.pipeline.offline import stored
from torchspec.core.pipeline.on_policy import pusher, writing_of, written_now
from torchspec.core.pipeline.parallel_fit import LogitsForm, choose_exchange, choose_logits
from torchspec.core.pipeline.rebuild import load_state, read_initial
from torchspec.core.pipeline.served_checks import measured_apart, served_checks
from torchspec.core.pipeline.topology import Streaming, colocated, disaggregated
from torchspec.core.training import checkpoint
from torchspec.core.training.capturing import Model
from torchspec.core.training.feed import DirectFeed, Feed
from torchspec.core.training.fp8 import Fp8Compute, Gathering, described, emulation, gathering_of, scaling_of
from torchspec.core.training.random_state import seed_rank
from torchspec.core.training.sharding import shard_draft
from torchspec.core.training.stored import StoredFeatures
from torchspec.core.training.trainer import Setup
from torchspec.core.training.validation import Validator

logger = logging.getLogger(__name__)

ProgressSink = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Tokenised samples and the prompts to validate on (empty: no validation)."""

    train: TokenDataset
    prompts: Sequence[Prompt]

    @property
    def images(self) -> bool:
        """Whether any of them has images."""
        return self.train.with_images is not None or any(prompt.images for prompt in self.prompts)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The target as this rank meets it: its head on the rank's device, and its engine here, or engines elsewhere."""

    spec: TargetSpec
    head: TargetHead
    engine: TargetEngine | None = None
    streaming: Streaming | None = None
    stored: StoredFeatures | None = None

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        if self.streaming is not None:
            self.streaming.close()


@dataclass(frozen=True, kw_only=True)
class Start:
    """What training starts from: a fresh draft, or tensors to begin with. `checkpoint`: the one to resume, if any."""

    vocabulary: VocabularyMap
    state: dict[str, Tensor] | None
    checkpoint: Path | None


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, context: ParallelContext, progress: ProgressSink | None
) -> Data:
    """Rank 0 tokenises, the others find its work in the cache."""
    settings = DatasetSettings.of_training(config)
    train = context.main_first(lambda: load_dataset(config.data.train, tokenizer, settings, progress))
    if config.pipeline.topology != "offline":  # what is stored was captured with its images
        check_images(config, train)
    if not config.data.validation:
        return Data(train=train, prompts=())
    # An engine that serves drafts, which is how others validate, answers text alone.
    images = {"images", "decode"} <= registry.backends().spec(config.backend).capabilities
    prompts = context.main_first(
        lambda: load_prompts(
            config.data.validation, tokenizer, settings, progress, count=config.eval.samples, images=images
        )
    )
    return Data(train=train, prompts=prompts)


def load_target(config: RunConfig, context: ParallelContext, *, images: bool = False) -> Target:
    """The engine with the target in it, and the target's own embedding, norm and head for the trainer. `images`: some
    samples or prompts have images."""
    path = resolve_target(config.target.path)
    trusted = config.target.trust_remote_code
    spec = read_target_spec(path, trusted)
    topology = config.pipeline.topology
    dtype = running_dtype(config.target.dtype, spec.dtype, context.torch_device)
    if spec.quantisation is not None and context.is_main:
        logger.info("the target is quantised: %s", described_quantisation(spec.quantisation))
    form, why = choose_logits(config)
    if why:
        logger.info("target.shard_logits is %s: %s", form, why)
    device = context.torch_device
    head: TargetHead
    if form == "off":
        head = load_target_head(path, dtype=dtype, device=device, trust_remote_code=trusted)
    else:
        shards = VocabularyShards(
            group=context.logits_group, communication=context.device.communication, target_size=spec.vocab_size
        )
        head = load_target_head_shard(path, shards, dtype=dtype, device=device, trust_remote_code=trusted)
    if topology == "offline":
        return Target(spec=spec, head=head, stored=stored(config))
    if topology == "disaggregated":
        options = engine_options(config, context.device, config.output / ENGINE, context.local_rank, images=images)
        return Target(spec=spec, head=head, streaming=disaggregated(config, options, context))
    directory = config.output / ENGINE / settings.host_name()
    options = engine_options(config, context.device, directory, context.local_rank, images=images)
    if topology == "colocated":
        return Target(spec=spec, head=head, streaming=colocated(config, options, context))
    options = replace(options, tensor_mesh=context.tensor if context.tensor.size() > 1 else None)
    return Target(spec=spec, head=head, engine=registry.load_engine(config.backend, options))


def forget_engine(config: RunConfig, context: ParallelContext) -> None:
    """What an earlier session left must not be taken for this one's worker."""
    if context.local_rank == 0 and config.pipeline.topology != "disaggregated":
        shutil.rmtree(config.output / ENGINE / settings.host_name(), ignore_errors=True)


def initial_path(config: RunConfig) -> Path | None:
    """`draft.init_from`, which every algorithm's options may have."""
    path: Path | None = getattr(config.draft, "init_from", None)
    return path


def find_start(config: RunConfig, algorithm: Algorithm, target: TargetSpec, data: Data, resumed: Path | None) -> Start:
    """Vocabulary map and first weights.

    The map is made from the data, unless the draft starts from another one: then it is that one's. A resumed run
    makes it again only to be compared with the checkpoint's (`checkpoint.load` refuses a difference).
    """
    path = initial_path(config)
    if path is not None and resumed is not None:
        return Start(vocabulary=checkpoint.load_vocabulary(resumed), state=None, checkpoint=resumed)
    if path is not None:
        state, vocabulary = read_initial(path, target)
        return Start(vocabulary=vocabulary, state=state, checkpoint=None)
    vocabulary = build_vocabulary(data.train.token_counts_V, algorithm.vocabulary_size, target.vocab_size)
    return Start(vocabulary=vocabulary, state=None, checkpoint=resumed)


def build_model(
    config: RunConfig, algorithm: Algorithm, target: Target, start: Start, context: ParallelContext, longest: int
) -> Model:
    """The sharded draft; every rank builds the same one from the seed, then draws from a random state of its own.

    `longest` is the length of the longest sample, on which the exchange of keys may depend.
    """
    torch.manual_seed(config.seed)
    draft = algorithm.build_draft(start.vocabulary, target.head)
    if start.state is not None:
        load_state(draft, start.state, initial_path(config) or Path())
    on_host, (logits, _) = config.train.offload, choose_logits(config)
    gather = gathering_of(config.precision, context.world_size, head_in_parts=logits == "vocabulary")
    states_on_host = on_host in ("states", "all")
    sharded = shard_draft(draft, context, config.precision.compute, states_on_host=states_on_host, gather=gather)
    seed_rank(context.device.runtime, config.seed, 0, context.rank)
    exchange, why = choose_exchange(config, algorithm, context.world_size, longest)
    if why:
        logger.info("parallel.exchange is %s: %s", exchange, why)
    return Model(
        algorithm=algorithm,
        draft=sharded,
        head=target.head,
        engine=target.engine,
        memory=step_memory(config.train, logits),
        exchange=exchange,
        offload_activations=on_host in ("activations", "all"),
        fp8=_fp8(config, sharded, gather, context),
    )


def _fp8(config: RunConfig, draft: nn.Module, gather: Gathering | None, context: ParallelContext) -> Fp8Compute | None:
    """How the draft's maps are computed in FP8, if they are; the main rank says which and by what."""
    if config.precision.compute != "fp8":
        return None
    chosen = Fp8Compute(scaling=scaling_of(config.precision))
    if context.is_main:
        logger.info(described(draft, chosen.scaling, gather))
        if (emulated := emulation(context.device)) is not None:
            logger.warning(emulated)
    return chosen


def build_feed(config: RunConfig, model: Model, target: Target, context: ParallelContext) -> Feed:
    """Collective."""
    if target.stored is not None:
        return target.stored.feed(model, context)
    if target.streaming is None:
        return DirectFeed(model, context, written_now(config, model, target.spec, context))
    return target.streaming.feed(model, context, writing_of(config, target.spec))


def step_memory(config: TrainConfig, logits: LogitsForm = "off") -> StepMemory:
    megabytes = config.loss_memory_mb
    return StepMemory(
        recompute=config.recompute,
        loss_bytes=None if megabytes is None else megabytes * 1_000_000,
        shard_logits="tokens" if logits == "off" else logits,
    )


def build_setup(
    config: RunConfig, model: Model, target: Target, data: Data, start: Start, context: ParallelContext,
    progress: ProgressSink | None,
) -> Setup:  # fmt: skip
    engine = measured_apart(config, registry.backends().spec(config.backend))
    own = engine is None and data.prompts
    usable = with_room(target.spec.max_position_embeddings, data.prompts) if own else []
    validator = Validator(
        model=model,
        vocabulary=start.vocabulary,
        prompts=usable,
        skipped=len(data.prompts) - len(usable),
        settings=config.eval,
        seed=config.seed,
        compute=config.precision.compute,
        context=context,
        progress=_named("validate", progress),
    )
    if usable:
        context.agree(validator.rehearse)
    served = None
    if engine is not None and context.is_main:
        visible = context.device.runtime.visible_devices_variable
        served = served_checks(config, engine, context.device.name, visible)
    facts = draft_facts(config, model.algorithm, target.spec, start.vocabulary, data.train.ingredients)
    return Setup(
        config=config.train,
        seed=config.seed,
        bucket_size=config.data.bucket_size,
        checkpoints=config.output / "checkpoints",
        facts=facts,
        vocabulary=start.vocabulary,
        validate=validator if usable else None,
        validate_every=config.eval.every,
        serve=engine is not None,
        served=served,
        alike=data.train.own_lengths if config.on_policy.enabled else None,
        on_policy=config.on_policy.enabled,
        push=pusher(config, model, context),
        push_every=config.on_policy.push_every,
    )


def _named(stage: str, progress: ProgressSink | None) -> ProgressSink | None:
    """The same sink under our name for the stage."""
    if progress is None:
        return None
    return lambda _, done, total: progress(stage, done, total)


def data_facts(data: TokenDataset, files: Sequence[Path], vocabulary: VocabularyMap) -> dict[str, Any]:
    """data.json: what became of the rows, and how much of the supervised text the draft can say."""
    return {
        **data.report.to_json(tuple(files)),
        "files": [str(file) for file in files],
        "fingerprint": data.fingerprint,
        "vocabulary_size": vocabulary.size,
        "vocabulary_coverage": coverage(data.token_counts_V, vocabulary),
    }
