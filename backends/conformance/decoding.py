"""The check of decode sessions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check

LENGTHS = (5, 23, 12)


class Session:
    """A session of the engine beside the tokens that it should hold; `errors` are those of all comparisons."""

    def __init__(self, subject: Subject, taps: Sequence[int]) -> None:
        self._subject, self._taps = subject, len(taps)
        self.sequences = [subject.tokens(length, length) for length in LENGTHS]
        self.session = subject.engine().open(self.sequences, taps)
        self.errors: list[float] = []
        prefill = self.session.prefill
        for row, prompt in enumerate(self.sequences):
            exact = subject.oracle.of(prompt)
            self._compare("prefill logits", prefill.logits_BV[row], exact.logits_TV[-1])
            self._compare("prefill taps", prefill.taps[row], exact.taps_TNH[:, : self._taps])

    def _compare(self, what: str, got: torch.Tensor, exact: torch.Tensor) -> None:
        self.errors.append(self._subject.error(what, got.float(), exact))

    def step(self, count: int, seed: int) -> None:
        new = [self._subject.tokens(count, seed + row) for row in range(len(self.sequences))]
        output = self.session.step(torch.tensor(new, device=self._subject.where))
        for row, tokens in enumerate(new):
            self.sequences[row] = self.sequences[row] + tokens
            exact = self._subject.oracle.of(self.sequences[row])
            self._compare("step logits", output.logits_BnV[row], exact.logits_TV[-count:])
            self._compare("step taps", output.taps_BnNH[row], exact.taps_TNH[-count:, : self._taps])

    def rollback(self, counts: list[int]) -> None:
        self.session.rollback(torch.tensor(counts, device=self._subject.where))
        self.sequences = [
            sequence[: len(sequence) - count] for sequence, count in zip(self.sequences, counts, strict=True)
        ]

    def keep(self, rows: list[int]) -> None:
        self.session.keep(rows)
        self.sequences = [self.sequences[row] for row in rows]


def stepping(subject: Subject) -> str:
    """Prefill, steps of several tokens, rollbacks and dropped rows against the whole sequence computed at once."""
    if "decode" not in subject.spec.capabilities:
        return "declared absent: no capability 'decode'"
    errors = []
    for taps in (subject.taps, ()):
        session = Session(subject, taps)
        session.step(4, 100)
        session.rollback([0, 4, 2])
        session.step(1, 200)
        session.step(3, 300)
        session.rollback([3, 0, 1])
        session.keep([2, 0])
        session.step(3, 400)
        session.rollback([1, 3])
        session.step(2, 500)
        session.keep([1, 0])
        session.rollback([2, 0])
        session.step(1, 600)
        errors += session.errors
    return (
        f"with taps and without, {len(errors)} comparisons, off by at most {max(errors):.1e} of {subject.tolerance:.0e}"
    )


DECODING = (Check("decode: steps and rollbacks", stepping, START),)
