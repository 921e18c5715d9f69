"""What a draft-training algorithm must provide. Trainer, decoding, export and evaluation know nothing of any one.

Shape letters: B sequences, T tokens, K unroll steps, L proposed tokens, V target vocabulary, N taps, H target hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from torchspec.core.interfaces.device import API_VERSION, Device
from torchspec.core.interfaces.engine import ImageReference, TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap

if TYPE_CHECKING:
    from torchspec.core.features.rows import FeatureRows


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One tokenised sequence with its supervision: mask[j] says that token j is to be predicted.

    `images` stand in the ids already, in this order, and are never supervised.
    """

    sample_id: str
    input_ids_T: Tensor  # int64
    loss_mask_T: Tensor  # bool
    images: tuple[ImageReference, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one micro-batch contributes; everything is a SUM, so micro-batches and ranks simply add.

    numerator    scalar with a graph: sum over counted slots of weight x loss
    denominator  scalar: sum of the weights of the counted slots
    sums         detached additive metrics by name, each a scalar or a [K] vector (see the algorithm's `summarise`)
    """

    numerator: Tensor
    denominator: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """How a training step is to trade memory.

    recompute     activations of the draft's layers are made again in the backward pass instead of being kept
    loss_bytes    what the loss may hold at a time beside its gradients; None: the device's own preference
    shard_logits  of a target's head that ranks share: whether each gets the logits of its own tokens, or keeps those
                  of its part of the vocabulary
    """

    recompute: bool = False
    loss_bytes: int | None = None
    shard_logits: Literal["tokens", "vocabulary"] = "tokens"


KEEP_ALL = StepMemory()


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a training a micro-batch stands.

    progress   steps done over those planned, from 0 up to (and without) 1
    previous   the sums that the algorithm `remembers`, of the window before over all its micro-batches and ranks; None
               before the first window with supervision
    draws      for each document of the rows a number in [0, 2^63) that decides what is drawn at random of it: made of
               the run's seed, the epoch and the sample, so that it does not depend on ranks, batches or topology
    """

    progress: float = 0.0
    previous: Mapping[str, Tensor] | None = None
    draws: tuple[int, ...] = ()


START = Moment()


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What of a draft's attention decides how ranks can share it: heads, and how often queries meet the same keys.

    steps      how often they do in a layer
    layers     each with keys of its own
    slots      queries of a position and step: of those positions that have any, and on average over the steps
    anchors    how many positions of a text have any, at most; None: all
    """

    query_heads: int
    key_heads: int
    head_size: int
    steps: int
    layers: int = 1
    slots: float = 1.0
    anchors: int | None = None

    def share(self, text: int | None) -> float:
        """Of the positions of texts of so many tokens, all supervised, those that have queries; None: few tokens."""
        return 1.0 if self.anchors is None or text is None else min(1.0, self.anchors / text)

    def queries(self, rows: int, text: int | None) -> int:
        """Of a step, at the rows of such texts."""
        return math.ceil(rows * self.share(text) * self.slots)


@dataclass(frozen=True, kw_only=True)
class DraftFiles:
    """A draft as a directory holds it: config.json and the tensors of model.safetensors.

    notes   what people must know before they serve it; written into the model card
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Drafted continuations; L may be smaller than the length asked for, down to 0.

    tokens_BL    int64, ids of the target vocabulary
    probs_BLV    the distribution each token was drawn from, over the target vocabulary; None means one-hot
    lengths_B    int64: how many of a row's tokens are drafted, the rest being padding; None means all
    """

    tokens_BL: Tensor
    probs_BLV: Tensor | None = None
    lengths_B: Tensor | None = None


class DraftSession(Protocol):
    """The draft's side of decoding a batch of sequences."""

    def propose(
        self,
        taps: Sequence[Tensor],
        next_tokens: Sequence[Tensor],
        length: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        """Take in what the target just confirmed, then draft `length` tokens for every sequence.

        taps[b], [m_b, N, H], are the target's taps at the m_b newly confirmed positions p..p+m_b-1 of sequence b
        (the whole prompt at the first call); next_tokens[b], [m_b], are the tokens at p+1..p+m_b.
        The first drafted token follows the last of next_tokens[b].
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every sequence but these."""
        ...


class Drafter(Protocol):
    """Makes draft sessions; prompt lookup is one too."""

    taps: tuple[int, ...]

    def open(self, batch_size: int) -> DraftSession: ...


class Algorithm(Protocol):
    """Everything specific to one algorithm, made from its validated options and the target's facts."""

    @property
    def name(self) -> str: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def options(self) -> Any: ...
    @property
    def geometry(self) -> Any:
        """A dataclass: everything that fixes the draft's arithmetic beside its weights and which layers it taps."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Tokens the draft can say."""
        ...

    @property
    def layouts(self) -> tuple[str, ...]:
        """Published layouts that can hold this draft, the one to write by default first."""
        ...

    @property
    def attention_shape(self) -> AttentionShape: ...
    @property
    def loss_steps(self) -> int:
        """Pairs that a target row teaches, at most."""
        ...

    @property
    def halo(self) -> int:
        """Rows of last hidden states that a slot needs to its right, from other ranks' pieces of a sequence."""
        ...

    @property
    def remembers(self) -> tuple[str, ...]:
        """Names of a window's `sums` that the next window's steps must be told (`Moment.previous`)."""
        ...

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Numbers that a token, all supervised, keeps for one backward pass, in the compute precision; for estimates.

        `text` is how many tokens each text has; None: so few that an algorithm that looks at some of a text's positions
        looks at all.
        "loss": while the loss is worked out, its gradients for the draft's outputs included; "backward": at the most
        that the backward pass then needs, parameters' gradients left out.
        """
        ...

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> nn.Module:
        """A freshly initialised float32 draft on the CPU, from torch's global random state.

        Its `state_dict` holds the trained tensors and the vocabulary map, never the target's weights.
        """
        ...

    def step(
        self,
        draft: nn.Module,
        head: TargetHead,
        rows: FeatureRows,
        device: Device,
        memory: StepMemory = ...,
        moment: Moment = ...,
    ) -> StepResult:
        """Training forward of one micro-batch (never empty; a hole is a sample whose mask is all False).

        With `rows.sequence` this is one rank's share: it computes the slots that `rows.layout` gives it, and what all
        those ranks return adds up to the result of one that owns everything.

        Every use of the draft's parameters happens inside one `draft(...)` call, so that FSDP's hooks see it, and
        the same collectives run whatever the masks hold. The call returns tensors, or tuples, lists or dicts of
        them (FSDP looks into nothing else), and uses every trained parameter.
        """
        ...

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
        """Readable metrics from sums added over micro-batches and ranks; holds `simulated_acceptance_length`."""
        ...

    def drafter(self, draft: nn.Module, head: TargetHead, device: Device) -> Drafter: ...

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        """The draft in a published layout ("plain" or "speculators"); ConfigError if that layout cannot hold it."""
        ...

    def serve(
        self, files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        """What an engine that reads `files` would predict, by a reader that shares no code with the trained module.

        After a prompt whose T positions have these taps and following tokens, the probabilities [L, V] from which
        each of the drafted tokens is drawn, given those before it (temperature 1). Raises CheckpointError naming
        every tensor that an engine would ignore or miss, and when the engine would tap other layers than `taps`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """Found through the entry-point group `torchspec.algorithms`.

    `options` is a pydantic model: the `draft` section of the configuration.
    `create(options, target)` raises ConfigError with every misfit between the two.
    `reads(config)` says whether a config.json describes a draft of this algorithm; `from_files` rebuilds the
    algorithm and the draft from one, raising CheckpointError with the tensors that are missing, unknown or misshapen.
    `published(files, target)` puts a directory of this algorithm that others wrote into the form that those two know
    and says in its notes what it changed; any other one it returns as it is. What only the target can tell (None: it is
    not known yet) stays open. Raises CheckpointError for a draft that cannot be put so. None: others write none.
    `unserved(algorithm)` says why no engine is known to serve a draft of these options, and what to train for one that
    is served (None: one is known): a run says it before it trains. None: all are served.
    """

    name: str
    options: type
    create: Callable[[Any, TargetSpec], Algorithm]
    reads: Callable[[dict[str, Any]], bool]
    from_files: Callable[[DraftFiles, TargetSpec], tuple[Algorithm, nn.Module]]
    published: Callable[[DraftFiles, TargetSpec | None], DraftFiles] | None = None
    unserved: Callable[[Any], str | None] | None = None
    capabilities: frozenset[str] = frozenset()
    api_version: int = API_VERSION
