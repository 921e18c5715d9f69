"""A whole training run small enough to start dozens of times: its own algorithm, a recurrent target, made-up samples.

Loaded by path, in tests and in the processes they start. Shape letters: T tokens, N taps (2), H hidden, V vocabulary,
K steps (2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core import registry
from torchspec.core.config.schema import TrainConfig
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import (
    START,
    DraftFiles,
    Moment,
    Proposal,
    StepMemory,
    StepResult,
    TrainingSample,
)
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import CaptureRequest, Prefill, StepOutput, TargetSpec
from torchspec.core.interfaces.features import Captured, Features, FeatureSink
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.objectives.terms import ObjectiveOptions, term_weights
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training import trainer
from torchspec.core.training.capturing import Model
from torchspec.core.training.random_state import seed_rank
from torchspec.core.training.sharding import shard_draft

V, H, K = 23, 10, 2
STEP_WEIGHTS = (1.0, 0.8)


class RecurrentTarget:
    """h_t = tanh(A e_t + B h_{t-1}); taps are e_t and h_t; logits read h_t. An engine and a head in one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.embedding_VH, self.head_VH = draw(V, H), 2.0 * draw(V, H)
        self.a_HH, self.b_HH = draw(H, H) / 2, draw(H, H) / 2

    def describe(self) -> TargetSpec:
        return TargetSpec(
            path=Path("recurrent"), architecture="Recurrent", model_type="recurrent", num_layers=2, hidden_size=H,
            intermediate_size=H, num_attention_heads=1, num_key_value_heads=1, head_dim=H, vocab_size=V,
            max_position_embeddings=4096, rms_norm_eps=1e-6, rope_parameters={}, dtype=torch.float32,
            tie_word_embeddings=False, eos_token_ids=(),
        )  # fmt: skip

    def states(self, tokens: Sequence[int], start_H: Tensor) -> tuple[Tensor, Tensor]:
        """taps_TNH and h_TH of tokens that follow the state `start_H`."""
        embedded_TH = self.embedding_VH[torch.tensor(list(tokens))]
        hidden, state_H = [], start_H
        for row_H in embedded_TH:
            state_H = torch.tanh(self.a_HH @ row_H + self.b_HH @ state_H)
            hidden.append(state_H)
        hidden_TH = torch.stack(hidden)
        return torch.stack((embedded_TH, hidden_TH), dim=1), hidden_TH

    def zero(self) -> Tensor:
        return torch.zeros(H, dtype=self.a_HH.dtype)

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        references = []
        for request in batch:
            taps_TNH, hidden_TH = self.states(request.input_ids, self.zero())
            features = Features(
                input_ids_T=torch.tensor(list(request.input_ids)),
                taps_TNH=taps_TNH,
                last_TH=hidden_TH,
                tap_layers=tuple(taps),
                norm_state="post_norm",
            )
            references.append(sink.put(request.record_id, features))
        return references

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        texts = []
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(max_new_tokens):
                tokens.append(int((self.states(tokens, self.zero())[1][-1] @ self.head_VH.T).argmax()))
            texts.append(tokens[len(prompt) :])
        return texts

    def open(self, prompts: Sequence[Sequence[int]], taps: Sequence[int]) -> RecurrentSession:
        return RecurrentSession(self, prompts)

    def close(self) -> None:
        return None

    def normed(self, last_TH: Tensor, state: str) -> Tensor:
        return last_TH

    def logits(self, normed_TH: Tensor, rows_NH: Tensor | None = None) -> Tensor:
        return self.finished(normed_TH @ (self.head_VH if rows_NH is None else rows_NH).T)

    def finished(self, products: Tensor) -> Tensor:
        return products


class RecurrentSession:
    """Keeps every state, so that rolling back is forgetting the last ones."""

    def __init__(self, target: RecurrentTarget, prompts: Sequence[Sequence[int]]) -> None:
        self.target = target
        made = [target.states(prompt, target.zero()) for prompt in prompts]
        self.rows = [list(hidden_TH) for _, hidden_TH in made]
        logits_BV = torch.stack([row[-1] for row in self.rows]) @ target.head_VH.T
        self.prefill = Prefill(logits_BV=logits_BV, taps=[taps_TNH for taps_TNH, _ in made])

    def step(self, tokens_Bn: Tensor) -> StepOutput:
        made = [self.target.states(t.tolist(), row[-1]) for t, row in zip(tokens_Bn, self.rows, strict=True)]
        for row, (_, hidden_nH) in zip(self.rows, made, strict=True):
            row.extend(hidden_nH)
        hidden_BnH = torch.stack([hidden_nH for _, hidden_nH in made])
        return StepOutput(logits_BnV=hidden_BnH @ self.target.head_VH.T, taps_BnNH=torch.stack([t for t, _ in made]))

    def rollback(self, count_B: Tensor) -> None:
        for row, count in zip(self.rows, count_B.tolist(), strict=True):
            del row[len(row) - count :]

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


class TinyDraft(nn.Module):
    """From the taps at t, the tokens at t + 1 and t + 2; everything of a step in one forward."""

    def __init__(self, vocabulary: VocabularyMap, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.norm = nn.Parameter(torch.ones(H))
        self.heads = nn.ModuleList(nn.Linear(H, vocabulary.size, bias=False) for _ in range(K))
        self.register_buffer("d2t", vocabulary.d2t_N)

    def hidden(self, taps_TNH: Tensor) -> Tensor:
        return torch.tanh(self.fc(taps_TNH.flatten(1).to(self.fc.weight.dtype))) * self.norm

    def forward(
        self,
        taps: Sequence[Tensor],
        tokens: Sequence[Tensor],
        masks: Sequence[Tensor],
        terms: Sequence[tuple[float, float]] = K * ((1.0, 0.0),),
    ) -> dict[str, Tensor]:
        """`terms`: of each step, what cross-entropy and TV to the text weigh."""
        wide = torch.promote_types(self.fc.weight.dtype, torch.float32)
        numerator, denominator = torch.zeros((), dtype=wide), torch.zeros((), dtype=wide)
        counted_K, correct_K = torch.zeros(K, dtype=torch.int64), torch.zeros(K, dtype=torch.int64)
        alpha_K = torch.zeros(K, dtype=wide)
        for taps_TNH, tokens_T, mask_T in zip(taps, tokens, masks, strict=True):
            hidden_TH = F.dropout(self.hidden(taps_TNH), self.dropout)  # draws from the global random state
            for k, (weight, (near, far)) in enumerate(zip(STEP_WEIGHTS, terms, strict=True)):
                shift = k + 1
                logits_TV = self.heads[k](hidden_TH)[: tokens_T.numel() - shift].to(wide)
                kept_T = mask_T[shift:].to(wide)
                loss_T = F.cross_entropy(logits_TV, tokens_T[shift:], reduction="none")
                alpha_T = torch.exp(-loss_T)  # the overlap with a target that is sure of the text
                numerator = numerator + weight * ((near * loss_T + far * (1 - alpha_T)) * kept_T).sum()
                denominator = denominator + weight * kept_T.sum()
                counted_K[k] += mask_T[shift:].sum()
                alpha_K[k] += (alpha_T.detach() * kept_T).sum()
                correct_K[k] += ((logits_TV.argmax(-1) == tokens_T[shift:]) & mask_T[shift:]).sum()
        sums = {"supervised": counted_K, "correct": correct_K, "alpha": alpha_K}
        return {"numerator": numerator, "denominator": denominator, **sums}


@dataclass(frozen=True)
class TinyAlgorithm:
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    name: str = "tiny"
    taps: tuple[int, ...] = (0, 1)
    options: Any = None
    vocabulary_size: int = V
    halo: int = K
    objective: ObjectiveOptions | None = None
    """Of `kl`, `tv` and `lk_lambda`; cross-entropy without."""

    @property
    def remembers(self) -> tuple[str, ...]:
        return () if self.objective is None else self.objective.remembers

    def kept_values(self, *, recompute: bool) -> float:
        return float(3 * H)

    def build_draft(self, vocabulary: VocabularyMap, head: Any) -> nn.Module:
        return TinyDraft(vocabulary, self.dropout).to(self.dtype)

    def step(
        self,
        draft: nn.Module,
        head: Any,
        rows: FeatureRows,
        device: Device,
        memory: StepMemory | None = None,
        moment: Moment = START,
    ) -> StepResult:
        lengths = (rows.tokens.document_BT >= 0).sum(-1).tolist()
        parts = (rows.taps_BSF, rows.tokens.input_ids_BT, rows.tokens.loss_mask_BT)
        cut = [[x_T[:length] for x_T, length in zip(part, lengths, strict=True)] for part in parts]
        if self.objective is None:
            made = draft(*cut)
        else:
            weights = term_weights(self.objective, moment, K * (1,), dtype=torch.float64, device=torch.device("cpu"))
            kl_K, tv_K = (
                (torch.zeros(K, dtype=torch.float64) + weights.get(term, 0.0)).tolist() for term in ("kl", "tv")
            )
            made = draft(*cut, list(zip(kl_K, tv_K, strict=True)))
        numerator, denominator = made.pop("numerator"), made.pop("denominator")
        return StepResult(numerator=numerator, denominator=denominator, sums=made)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
        accuracy = (sums["correct"] / sums["supervised"].clamp(min=1)).tolist()
        return {"accuracy": accuracy, "simulated_acceptance_length": 1 + accuracy[0] * (1 + accuracy[1])}

    def drafter(self, draft: nn.Module, head: Any, device: Device) -> TinyDrafter:
        assert isinstance(draft, TinyDraft)
        return TinyDrafter(draft)

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        return DraftFiles(config={"layout": layout}, tensors=draft_state)


@dataclass
class TinyDrafter:
    draft: TinyDraft
    taps: tuple[int, ...] = (0, 1)

    def open(self, batch_size: int) -> TinyDraftSession:
        return TinyDraftSession(self.draft)


@dataclass
class TinyDraftSession:
    """The second head looks one token past the newest tap: it drafts the token after the pending one."""

    draft: TinyDraft

    def propose(
        self,
        taps: Sequence[Tensor],
        next_tokens: Sequence[Tensor],
        length: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        hidden_BH = torch.cat([self.draft.hidden(taps_TNH[-1:]) for taps_TNH in taps])
        guess_B1 = self.draft.heads[1](hidden_BH).argmax(-1, keepdim=True)
        return Proposal(tokens_BL=guess_B1.expand(-1, length).clone())

    def keep(self, rows: Sequence[int]) -> None:
        return None


@dataclass
class TinySamples:
    """Token sequences of several lengths; the samples named in `unsupervised` have an empty mask."""

    count: int = 13
    unsupervised: Sequence[int] = ()
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = [9 + (7 * i) % 11 for i in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TrainingSample:
        generator = torch.Generator().manual_seed(100 + index)
        ids_T = torch.randint(0, V, (self.lengths[index],), generator=generator)
        ids_T[1::2] = (ids_T[::2][: ids_T[1::2].numel()] * 3 + 1) % V  # something to learn
        mask_T = torch.arange(self.lengths[index]) > index % 4
        if index in self.unsupervised:
            mask_T = torch.zeros_like(mask_T)
        return TrainingSample(sample_id=f"row-{index}", input_ids_T=ids_T, loss_mask_T=mask_T)


@dataclass(kw_only=True)
class Job:
    """What a tiny run may vary."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    samples: TinySamples = field(default_factory=TinySamples)
    seed: int = 3
    compute: str = "float32"
    facts: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] | None = None


def cpu() -> Device:
    return registry.load_device("cpu")


def make_trainer(job: Job, context: ParallelContext, validate: Any = None, validate_every: int = 0) -> trainer.Trainer:
    objective = None if job.objective is None else ObjectiveOptions(objective=job.objective)
    algorithm = TinyAlgorithm(dropout=job.dropout, dtype=job.dtype, objective=objective)
    target = RecurrentTarget(job.dtype)
    vocabulary = VocabularyMap.identity(V)
    torch.manual_seed(job.seed)
    draft = shard_draft(algorithm.build_draft(vocabulary, target), context, job.compute)
    seed_rank(context.device.runtime, job.seed, 0, context.rank)
    facts = {"identity": {"vocabulary": {"target_size": V}, "order": {"seed": job.seed}, **job.facts}}
    setup = trainer.Setup(
        config=TrainConfig(**{"batch_size": 5, "micro_batch_size": 2, "lr": 0.02, "warmup_steps": 2} | job.config),
        seed=job.seed,
        bucket_size=2,
        checkpoints=job.directory / "checkpoints",
        facts=facts,
        vocabulary=vocabulary,
        validate=validate,
        validate_every=validate_every,
    )
    model = Model(algorithm=algorithm, draft=draft, head=target, engine=target)
    return trainer.Trainer(model, job.samples, setup, context)
