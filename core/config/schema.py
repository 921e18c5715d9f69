"""The run configuration: one typed schema behind the command line, YAML and Python.

Every field has a default or is required, a one-line description (shown by `--help` and in the generated
reference), and is used. The `draft` section belongs to the algorithm and is put in by `run_schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from torchspec.core.config.accelerators import accelerators

if TYPE_CHECKING:
    from torchspec.core.interfaces.engine import EngineProcess

LEAST_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature leave float32; there is nothing left to sample either."""


def _temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or a number >= {LEAST_TEMPERATURE:g}")
    return value


def _known_accelerator(name: str) -> str:
    if name not in accelerators():
        raise ValueError(
            f"no figures are known of it, but of {', '.join(accelerators())}; device_tflops gives your own"
        )
    return name


Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Temperature = Annotated[float, Field(ge=0), AfterValidator(_temperature)]


class Section(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TargetReading(Section):
    """How a target's directory is read."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision the target runs in; auto: as stored, float32 on a CPU"
    )
    chat_template: Path | None = Field(None, description="a Jinja file used instead of the tokenizer's own template")
    thinking: Literal["auto", "on", "off"] = Field(
        "auto",
        description="have the target reason before it answers, or not; auto: as its chat template does by itself",
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the target's directory")


class TargetConfig(TargetReading):
    path: Path = Field(description="directory of the target, or `embedded` for the one that ships")
    tensor_parallel: Positive = Field(1, description="ranks that hold the target together, each a part of its weights")
    shard_logits: Literal["auto", "off", "tokens", "vocabulary"] = Field(
        "auto", description="spread the target's head over ranks; auto: where they hold the target together"
    )


class DataConfig(Section):
    train: list[Path] = Field(description="JSON, JSONL or Parquet files of conversations", min_length=1)
    validation: list[Path] = Field([], description="files for validation by real decoding; empty: none")
    max_length: Positive = Field(2048, description="longer samples are cut to this many tokens")
    min_supervised_tokens: Positive = Field(1, description="samples with fewer supervised tokens are filtered")
    last_turn_only: Literal["never", "always", "auto"] = Field(
        "auto", description="supervise only the last assistant turn; auto: where the sample holds reasoning"
    )
    cache_dir: Path | None = Field(None, description="tokenised data is kept here; default: the user's cache")
    bucket_size: Positive = Field(16, description="similar lengths are batched within windows of this many batches")


class TrainConfig(Section):
    epochs: Positive = Field(1, description="passes over the data")
    max_steps: Positive | None = Field(None, description="stop after this many optimizer steps")
    batch_size: Positive = Field(8, description="samples of one optimizer step, over all ranks")
    micro_batch_size: Positive = Field(8, description="samples of one forward pass on one rank")
    tokens_per_rank: Positive | None = Field(
        None, description="pack the samples of a forward pass into one row of at most this many tokens per rank"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit: its moments in 8 bits a value (torchao), 6 bytes less per parameter"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="decay rates of AdamW's two moments")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="learning rate after warm-up")
    warmup_ratio: Fraction = Field(0.04, description="linear warm-up, as a part of the run's optimizer steps")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="linear warm-up in optimizer steps, in the place of warmup_ratio"
    )
    decay_fraction: Fraction = Field(0.2, description="wsd: the last part of the run, in which the rate decays")
    min_lr_ratio: Fraction = Field(0.05, description="final learning rate over the peak")
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm is clipped to this; null: not clipped")
    recompute: bool = Field(
        False, description="make the draft's activations again in the backward pass: less memory, more time"
    )
    loss_memory_mb: Positive | None = Field(
        None, description="what the loss may hold beside its gradients, in 1e6 bytes; default: the device's preference"
    )
    offload: Literal["none", "activations", "states", "all"] = Field(
        "none", description="what waits in the host's memory: activations; parameters and optimizer state; both"
    )
    memory_gb: float | None = Field(
        None, gt=0, description="memory of a rank that the plan has to fit, in 1e9 bytes; default: what the device has"
    )
    log_every: Positive = Field(1, description="steps between lines of metrics.jsonl")
    trackers: list[str] = Field(
        [], description="who else gets the metrics: tensorboard, wandb, mlflow, trackio or a plug-in's name"
    )
    project: str | None = Field(
        None, description="what trackers file the run under; default: their own variable's value, else torchspec"
    )
    profile_step: Positive | None = Field(
        None, description="record what host and device do in this step, a trace for each rank in OUTPUT/profile"
    )
    checkpoint_every: Positive = Field(200, description="steps between checkpoints")
    keep_last: Positive = Field(2, description="this many newest checkpoints stay; the best one always does")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue the run in the run directory; never: refuse a used directory"
    )


class ParallelConfig(Section):
    """How ranks share sequences; what is left of them divides the batches."""

    ulysses: Positive = Field(1, description="ranks that share a sequence and, in its attention, the heads")
    ring: Positive = Field(1, description="groups of such ranks that share a sequence and, in its attention, the keys")
    exchange: Literal["auto", "gather", "ulysses", "ring", "usp"] = Field(
        "auto", description="how keys of other ranks are met (docs/long-sequences.md); auto: by bytes sent and held"
    )


class PrecisionConfig(Section):
    compute: Literal["float32", "bfloat16", "fp8"] = Field(
        "float32", description="precision of the draft's matrix products; parameters and optimizer state stay float32"
    )
    fp8_scaling: Literal["row", "tensor"] | None = Field(
        None, description="fp8: a scale for each row of an operand, or one for all of it; default: row"
    )
    fp8_all_gather: Literal["auto", "on", "off"] = Field(
        "auto", description="fp8: ranks gather weights in FP8, not in bf16; auto: where there are several ranks"
    )


class EngineConfig(Section):
    """The process of a target engine that runs in an environment of its own."""

    python: Path | None = Field(
        None, description="interpreter of an environment with the engine; default: what `torchspec engine install` made"
    )
    url: str | None = Field(None, description="address of an engine's worker that is running already (docs/engines.md)")
    tensor_parallel: Positive = Field(1, description="devices over which the engine splits the target")
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each device's memory for the engine; default: its own, or 0.5 (colocated)",
    )
    store_mb: Positive | None = Field(
        None, description="features that may wait to be taken, in 1e6 bytes; default: 2000, or what shared memory has"
    )
    start_timeout: float = Field(
        600, gt=0, description="seconds the engine may take to start, and to come back after it died"
    )
    call_timeout: float = Field(600, gt=0, description="seconds one call to the engine may take")
    options: dict[str, Any] = Field({}, description="arguments of the engine's own constructor, as {name: value}")

    def process(self) -> EngineProcess:
        """As engines take it."""
        from torchspec.core.interfaces.engine import EngineProcess  # brings torch, which this module does without

        return EngineProcess(**dict(self))


class PipelineConfig(Section):
    """Where the target runs beside the trainer, and how its features come."""

    topology: Literal["inprocess", "colocated", "disaggregated", "offline"] = Field(
        "inprocess",
        description="inprocess: the engine makes features when they are needed; colocated: engines in processes of "
        "their own, on the trainer's devices, make them ahead; disaggregated: so do engines on other devices of a Ray "
        "cluster; offline: they were made once, by `torchspec capture` (docs/pipelines.md)",
    )
    engines: Positive | None = Field(
        None,
        description="colocated: engines on each machine, by default as many as its devices allow; disaggregated: in "
        "all, by default 1",
    )
    trainers: Positive | None = Field(None, description="disaggregated: ranks that train; default: 1")
    features: Path | None = Field(
        None, description="offline: the directory that `torchspec capture` has written features to"
    )
    store: Literal["auto", "shared", "device", "mooncake", "stream"] = Field(
        "auto",
        description="how features come from engines: shared: files in the machine's shared memory; device: buffers "
        "that engine and trainer share on their device (a CPU's: shared memory, used again and again); mooncake: "
        "between machines; stream: the engine's worker sends them itself; auto: by topology and engine",
    )
    multiplex: Literal["auto", "on", "off"] = Field(
        "auto",
        description="colocated: have a service of the device's own (CUDA: MPS) run engine and trainer at the same "
        "time; auto: where there is one and torchspec starts the ranks",
    )
    prefetch_mb: Positive | None = Field(
        None, description="features that a rank may ask for ahead of their use, in 1e6 bytes; default: 500"
    )


class OnPolicyConfig(Section):
    """Answers that the target writes while the draft is trained, in place of those of the data."""

    enabled: bool = Field(
        False, description="learn from what the target writes now; the data bring the prompts (docs/on-policy.md)"
    )
    max_new_tokens: Positive = Field(512, description="tokens of an answer, as far as data.max_length has room")
    temperature: Temperature = Field(0.0, description="sampling temperature; 0: greedy")
    draft_length: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens that the draft in training drafts per round; 0: the target writes alone"
    )
    push_every: Positive = Field(50, description="steps between handing the draft to the engines that write with it")


class RayConfig(Section):
    """The cluster on which a disaggregated run places its processes."""

    address: str | None = Field(
        None, description="address of a running cluster, or `auto` to find it; default: one started on this machine"
    )
    resource: str | None = Field(
        None, description="what the cluster calls one device of this kind; default: the device's own name for it"
    )
    cpus_per_engine: float = Field(1, ge=0, description="CPU cores that an engine reserves, per device")
    cpus_per_trainer: float = Field(1, ge=0, description="CPU cores that a rank reserves")
    start_timeout: float = Field(300, gt=0, description="seconds the cluster may take to have room for the run")
    restarts: Annotated[int, Field(ge=0)] = Field(
        3, description="how often ranks are started again after one of them died, without a checkpoint in between"
    )


class MooncakeConfig(Section):
    """The Mooncake store of a disaggregated run."""

    master: str | None = Field(None, description="HOST:PORT of a running master; default: one is started for the run")
    protocol: Literal["tcp", "rdma"] = Field("tcp", description="how features travel between machines")
    rdma_devices: str = Field("", description="comma-separated names of RDMA devices; empty: those it finds")


class DecodingConfig(Section):
    """How a draft is measured by decoding with it."""

    samples: Positive = Field(16, description="prompts decoded, at even distances over the files")
    max_new_tokens: Positive = Field(128, description="tokens generated per prompt")
    draft_length: Positive = Field(5, description="tokens drafted per round")
    temperature: Temperature = Field(0.0, description="sampling temperature; 0: greedy")
    batch_size: Positive = Field(1, description="prompts decoded together")


class EvalConfig(DecodingConfig):
    every: Annotated[int, Field(ge=0)] = Field(0, description="steps between validations by decoding; 0: at the end")
    engine: str | None = Field(
        None, description="validate in this serving engine, beside the training; default: our own decoder if it can"
    )
    devices: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="numbers of the devices that the serving engine sees; empty: those of the training"
    )
    timeout: float = Field(3600, gt=0, description="seconds one validation in a serving engine may take")
    tolerance: Fraction = Field(
        0.05, description="how far the engine's acceptance length may be from our decoder's, relative"
    )
    serving: EngineConfig = Field(
        default_factory=lambda: EngineConfig(), description="the serving engine's process, as in `engine`"
    )


class RunConfig(Section):
    """Without the algorithm's `draft` section; `run_schema` adds it."""

    output: Path = Field(description="the run directory")
    device: str | None = Field(None, description="cpu, cuda, npu or a plug-in's name; default: what is here")
    device_gb: float | None = Field(
        None,
        gt=0,
        description="memory of one device, in 1e9 bytes, for plans (--dry-run) where none is on this machine; default: "
        "what `device_name` has",
    )
    device_name: Annotated[str, AfterValidator(_known_accelerator)] | None = Field(
        None,
        description="an accelerator that the plan knows the vendor's figures of (a100, h100, h200, b200, mi300x, ...: "
        "docs/sizing.md), for its time where no device is on this machine",
    )
    device_tflops: float | None = Field(
        None,
        gt=0,
        description="for the plan's time: what matrix products of the run's precision reach on one device, in 1e12 "
        "operations a second; default: measured, or of `device_name`",
    )
    backend: str = Field("hf", description="target engine: hf, sglang, vllm or a plug-in's name")
    algorithm: str = Field("eagle3", description="draft algorithm")
    seed: Seed = Field(0, description="seeds data order and initialisation")
    target: TargetConfig
    data: DataConfig
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    pipeline: PipelineConfig = Field(default_factory=lambda: PipelineConfig())
    on_policy: OnPolicyConfig = Field(default_factory=lambda: OnPolicyConfig())
    ray: RayConfig = Field(default_factory=lambda: RayConfig())
    mooncake: MooncakeConfig = Field(default_factory=lambda: MooncakeConfig())
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig())
    precision: PrecisionConfig = Field(default_factory=lambda: PrecisionConfig())
    eval: EvalConfig = Field(default_factory=lambda: EvalConfig())

    draft: Any = None


Schema = TypeVar("Schema", bound=Section)


def stated(options: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checked section's JSON what is not its default: what else a file named in it says is not contradicted.

    Nothing is lost: a default that somebody wrote, too, was found to agree with the file when the section was checked.
    """
    defaults = options().model_dump(mode="json")
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def run_schema(options: type[BaseModel]) -> type[RunConfig]:
    """`RunConfig` with the `draft` section typed by an algorithm's options."""
    return with_draft(RunConfig, options)


def with_draft(base: type[Schema], options: type[BaseModel]) -> type[Schema]:
    """`base` with its `draft` section typed by an algorithm's options."""
    default = Field(default_factory=options, description="the draft; options of the algorithm")
    return create_model(base.__name__, __base__=base, draft=(options, default))
