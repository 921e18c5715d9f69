"""Validation by real decoding: every target decodes its share of the prompts, the counts are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from torchspec.core.config.schema import EvalConfig
from torchspec.core.decoding.evaluate import EvalResult, EvalSettings, evaluate
from torchspec.core.decoding.measure import Progress, PromptLike
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.capturing import Model
from torchspec.core.training.sharding import COMPUTE, unsharded_state

MICROSECONDS = 1_000_000
REHEARSED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Decodes validation prompts with an unsharded copy of the draft as it stands, in its compute precision.

    Calling it is a collective.

    The result depends on the weights alone (and on `seed` at a temperature above 0); the caller keeps the random
    states apart (`random_state.untouched`), since building the copy draws from them.
    """

    model: Model
    vocabulary: VocabularyMap
    prompts: Sequence[PromptLike]  # all of them leave the target room for an answer (`measure.with_room`)
    skipped: int  # those that did not
    settings: EvalConfig
    seed: int
    compute: str
    context: ParallelContext
    progress: Progress | None = None

    def __call__(self) -> dict[str, Any]:
        """A row for metrics.jsonl, the same on every rank; tokens per second are of all ranks together."""
        drafter = self.model.algorithm.drafter(self._copy(), self.model.head, self.context.device)
        share = self._share()
        result = None
        engine = self.model.engine
        assert engine is not None
        if share:
            settings = EvalSettings(
                max_new_tokens=self.settings.max_new_tokens,
                draft_length=self.settings.draft_length,
                temperature=self.settings.temperature,
                batch_size=self.settings.batch_size,
                seed=self.seed + self.context.target_index,
                warmup=0,
                compare_draftless=False,
            )
            result = self.context.agree(lambda: evaluate(engine, drafter, share, settings, progress=self.progress))
        else:  # fewer prompts than targets
            self.context.agree(lambda: None)
        return self._merge(result)

    def rehearse(self) -> None:
        """Open a session as the validations will, with the beginnings of prompts; the engine's own error if it cannot.

        Whether a target can be decoded, and so many sequences of it together, is known only with the target loaded.
        """
        first = self._share()[: self.settings.batch_size]
        if first and self.model.engine is not None:
            beginnings = [list(islice(prompt.input_ids, REHEARSED_TOKENS)) for prompt in first]
            self.model.engine.open(beginnings, self.model.algorithm.taps)

    def _share(self) -> list[PromptLike]:
        """The prompts of this rank's target; none where there are fewer than targets."""
        return list(self.prompts[self.context.target_index :: self.context.targets])

    def _copy(self) -> nn.Module:
        state = unsharded_state(self.model.draft)
        draft = self.model.algorithm.build_draft(self.vocabulary, self.model.head)
        draft.load_state_dict(state)
        return draft.to(device=self.context.torch_device, dtype=COMPUTE[self.compute]).requires_grad_(False).eval()

    def _merge(self, result: EvalResult | None) -> dict[str, Any]:
        counts = [0] * (5 + self.settings.draft_length)
        slowest = 0
        if result is not None and self.context.tensor_rank == 0:  # ranks that hold a target together decode the same
            accepted = [count for record in result.records for count in record.accepted]
            reached = [sum(count > place for count in accepted) for place in range(self.settings.draft_length)]
            counts = [result.rounds, result.proposed, result.accepted, result.tokens, result.prompts]
            counts += reached
            slowest = int(result.seconds.total * MICROSECONDS)
        rounds, proposed, accepted_total, tokens, prompts, *reached = self.context.sum(counts)
        seconds = self.context.max([slowest])[0] / MICROSECONDS
        return {
            "acceptance_length": 1.0 + (accepted_total / rounds if rounds else 0.0),
            "acceptance_per_position": [count / rounds if rounds else 0.0 for count in reached],
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "seconds": seconds,
            "rounds": rounds,
            "proposed": proposed,
            "accepted": accepted_total,
            "tokens": tokens,
            "prompts": prompts,
            "skipped": self.skipped,
            "draft_length": self.settings.draft_length,
            "temperature": self.settings.temperature,
            "max_new_tokens": self.settings.max_new_tokens,
        }
