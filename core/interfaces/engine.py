"""What a target engine must provide: hidden states for training, text, and steps for lossless decoding.

Shape letters: B sequences, T tokens of a sequence, n new tokens, V vocabulary, N taps, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchspec.core.interfaces.device import API_VERSION, Availability, Device
from torchspec.core.interfaces.features import Captured, FeatureSink


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Facts about a target that trainers and exporters need; read from its configuration.

    `trust_remote_code`: the user allows the target's own code, so whoever reads more of the target may run it too.
    `latent_sizes`: of a target with multi-head latent attention those that its configuration states, by its names
    (`core.models.latent.LATENT_SIZES`); None: it has another kind of attention.
    `quantisation`: what its configuration says of how its weights are quantised; None: nothing.
    """

    path: Path
    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, object]
    dtype: torch.dtype
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    trust_remote_code: bool = False
    latent_sizes: dict[str, int] | None = None
    quantisation: dict[str, object] | None = None


Rows = tuple[tuple[int, int], ...]
"""Pieces [start, stop) of a sample's tokens."""


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """An image of a conversation: by reference, since messages carry no tensors.

    source  absolute path of a file, or a `data:` URI
    digest  sha256 of its bytes, as hex: whoever opens it knows that it is the one that was tokenised
    """

    source: str
    digest: str


Images = tuple[ImageReference, ...]
"""Of one sequence, in the order in which its ids have them."""


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """A sample to run the target over.

    `images` stand in the ids already, by the tokens that the target's processor makes of them, in this order. Only
    engines with the capability "images" take them.
    `parts`: the rows that each of several callers takes, all of which send the same request under the same id; this one
    takes `parts[part]`, as a record of those rows. Without parts there is one caller, and the record is whole. Only
    engines in workers know parts.
    """

    record_id: str
    input_ids: Sequence[int]
    parts: tuple[Rows, ...] = ()
    part: int = 0
    images: Images = ()


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Of the tokens just fed: logits_BnV (fp32 or the target's dtype) and taps_BnNH."""

    logits_BnV: Tensor
    taps_BnNH: Tensor


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Of the prompts: logits after each prompt's last token, and the taps of every prompt token."""

    logits_BV: Tensor
    taps: list[Tensor]  # one [T_b, N, H] per prompt


class DecodeSession(Protocol):
    """A batch of sequences with the target's key/value cache behind it."""

    prefill: Prefill

    def step(self, tokens_Bn: Tensor) -> StepOutput:
        """Append n tokens to every sequence and run the target over them."""
        ...

    def rollback(self, count_B: Tensor) -> None:
        """Forget the last count[b] tokens of sequence b (0 <= count[b] <= tokens of the last step)."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every sequence but these (finished ones stop costing work)."""
        ...


class TextGenerator(Protocol):
    """What writes a target's text."""

    def describe(self) -> TargetSpec: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[Images] = (),
    ) -> list[list[int]]:
        """New tokens of each prompt, the end-of-turn token included when it was produced.

        What is drawn at temperature > 0 depends on `seed` and on the prompt's tokens, not on the other prompts.
        `images`, of each prompt, is given to engines with the capability "images" alone, and only where there are any.
        """
        ...


class TargetEngine(TextGenerator, Protocol):
    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        """Run the target over each token sequence, write `Features` into the sink, return references in order.

        A sample that cannot be captured is quarantined: the others are there all the same. ValueError with the sample's
        id, before anything is put, for one without tokens or with some that the target has no embedding for: whoever
        asks has another target's tokens.
        """
        ...

    def open(
        self, prompts: Sequence[Sequence[int]], taps: Sequence[int], *, images: Sequence[Images] = ()
    ) -> DecodeSession:
        """Only engines with the capability "decode". `images`: as for `generate`; a prompt with any is opened alone."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EngineProcess:
    """How to have an engine that runs in a process of its own, in an environment of its own.

    python           its interpreter; None: that of the environment which `torchspec engine install` made
    url              a worker that is running already; None: one is started, watched, and stopped at the end
    tensor_parallel  devices over which the engine splits the target
    memory_fraction  of each device's memory, for the engine; None: the engine's own default
    store_mb         1e6 bytes of features that may wait to be taken; None: 2000, or what shared memory has room for
    start_timeout    seconds the engine may take to start, and to come back after it died
    call_timeout     seconds one call may take
    options          arguments of the engine's own constructor
    host             address that its worker listens on
    devices          accelerators that it sees; None: those that this process does
    delivery         how features come from it: see `core.workers.delivery`
    """

    python: Path | None = None
    url: str | None = None
    tensor_parallel: int = 1
    memory_fraction: float | None = None
    store_mb: int | None = None
    start_timeout: float = 600.0
    call_timeout: float = 600.0
    options: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    devices: tuple[int, ...] | None = None
    delivery: Mapping[str, Any] = field(default_factory=lambda: {"kind": "shared"})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is loaded with.

    `tensor_mesh`: one-dimensional mesh of the ranks that hold the target together; None: this rank alone. They call the
    same methods with the same arguments, in the same order, and each gets the whole result.
    `taps`: the layers that will be captured; an engine that has to be told when it starts captures no others.
    `process`: only for engines of that kind. The ranks of a machine share one process: rank `local_rank` 0 starts it,
    and the others find it through files in `directory`, where its log is too (None: this rank is alone).
    `streamed`: several threads will capture, ahead of time, and what they get stays in the host's memory.
    `images`: some of what it will be asked has images; an engine that finds that it takes none of this target's says
    so when it starts.
    """

    target: Path
    device: Device
    local_rank: int = 0
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    trust_remote_code: bool = False
    tensor_mesh: DeviceMesh | None = None
    taps: tuple[int, ...] = ()
    process: EngineProcess = EngineProcess()
    directory: Path | None = None
    streamed: bool = False
    images: bool = False


@dataclass(frozen=True, kw_only=True)
class ServedText:
    """New tokens of a prompt, and how its drafting went: accepted tokens per round, None where an engine keeps silent.

    `rounds` and `accepted_tokens` are of this text; None where the engine counts them only in all.
    """

    tokens: tuple[int, ...]
    accepted: tuple[int, ...] | None = None
    rounds: int | None = None
    accepted_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DraftSource:
    """Where a training leaves the draft that it trains (`core.decoding.pushed`), for the target to write with.

    `length`: tokens drafted per round.
    """

    directory: Path
    length: int


@dataclass(frozen=True, kw_only=True)
class ServingCounters:
    """A serving engine's own counters: drafting rounds, drafted and accepted tokens, and rounds per position that
    accepted at least so many (None where it does not count them)."""

    rounds: int
    drafted: int
    accepted: int
    per_position: tuple[int, ...] | None


class ServingEngine(Protocol):
    """A target as it is served, with a draft or without. `name` and `version` are the engine's."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...

    def decode(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[ServedText]:
        """Each prompt continued to its first end-of-turn token, which is part of the text, or to the limit."""
        ...

    def counters(self) -> ServingCounters: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EngineUsage:
    """Of an engine in a worker since it started: seconds, those in which it had work, tokens captured or written; and
    the records and bytes of features that wait there to be taken."""

    seconds: float
    busy_seconds: float
    tokens: int
    records: int
    nbytes: int


class Author(Protocol):
    """A target that writes while a draft is trained."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        source: DraftSource | None = None,
    ) -> list[ServedText]:
        """As `generate`; with the newest draft of `source`, if there is one by now. TargetError where it cannot."""
        ...


class StreamedEngine(TargetEngine, Author, Protocol):
    """An engine in a worker, which several threads may ask. `room`: bytes of features that may wait there. `serial`: it
    works on one request at a time, and those that wait have their deadline, too."""

    @property
    def room(self) -> int: ...
    @property
    def serial(self) -> bool: ...

    def usage(self) -> EngineUsage:
        """TargetError when it cannot say now."""
        ...


class StartedEngine(Protocol):
    """A worker that this process started and watches: it is started again when it dies, until it is closed."""

    def close(self) -> None: ...


ENGINE_CAPABILITIES = {
    "capture": "hidden states of token sequences",
    "generate": "text",
    "images": "token sequences with images among them, for whatever else it does",
    "decode": "steps of several tokens and rollbacks (`open`), for lossless decoding by torchspec itself",
    "serve": "the target served with an exported draft (`EngineSpec.serve`)",
}
"""What an engine may declare; every engine captures and generates."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Light description found through the entry-point group `torchspec.backends`.

    `probe`: whether the engine can be used with nothing said but its name.
    `available`: the same on a device (by name) with this `EngineProcess`; None: it runs in the caller's process.
    `command`: what to type to start a worker, at this port, that a training can attach to.
    `serve`: the target served with an exported draft (None: without) that drafts so many tokens a round.
    `start`: a worker with the target in it, which others find through `options.directory`; `attach`: to one of those.
    None: the engine runs in the process that loads it, and a worker of torchspec's own can host it.
    `tensor_parallel_sizes`: over how many of the trainer's ranks a target can be split, ascending from 1; TargetError
    names what stands in the way of its architecture. None: this engine takes no `tensor_mesh`.
    `examine`: TargetError when the engine cannot run this target as it is stored; else what is worth knowing of how it
    does (None: nothing). None: the engine says so itself when it starts.
    `serving_command`: what to type in a shell to serve a target with a draft: (the target's name, a directory with the
    draft's files, the draft's name, tokens a round); ConfigError where the engine does not decode with it.
    `pieces`: options of the engine with which it reads prompts in pieces of some 64 tokens, for conformance; None: it
    always reads them whole.
    `capabilities` are some of ENGINE_CAPABILITIES.
    """

    name: str
    probe: Callable[[], Availability]
    load: Callable[[EngineOptions], TargetEngine]
    capabilities: frozenset[str] = frozenset({"capture", "generate"})
    available: Callable[[str, EngineProcess], Availability] | None = None
    command: Callable[[EngineOptions, int], str] | None = None
    serve: Callable[[EngineOptions, Path | None, int], ServingEngine] | None = None
    start: Callable[[EngineOptions], StartedEngine] | None = None
    attach: Callable[[EngineOptions], StreamedEngine] | None = None
    tensor_parallel_sizes: Callable[[TargetSpec], tuple[int, ...]] | None = None
    examine: Callable[[TargetSpec], str | None] | None = None
    serving_command: Callable[[str, Path, str, int], str] | None = None
    pieces: Mapping[str, Any] | None = None
    api_version: int = API_VERSION
