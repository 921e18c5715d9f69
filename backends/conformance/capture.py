"""Checks of `TargetEngine.capture`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchspec.backends.api import CaptureRequest, Quarantined, RecordRef, TargetEngine
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check, NotHereError
from torchspec.core.features.memory import MemoryStore

START = 900.0
"""Seconds of a check that may have to start the engine."""

MANY = 700
LONGEST = 40_000


def _samples(subject: Subject) -> list[list[int]]:
    """One token, many, as many as the target takes; some begin alike, which an engine that keeps prefixes uses."""
    most = min(MANY, subject.target.max_position_embeddings)
    lengths = [length for length in (1, 2, 17, 33, 150, most - 1, most) if 0 < length <= most]
    beginning = subject.tokens(min(64, most // 2), 99)
    alike = [beginning + subject.tokens(n, n) for n in (5, 9, 40) if len(beginning) + n <= most]
    return [subject.tokens(length, seed) for seed, length in enumerate(lengths)] + alike


def _compare(subject: Subject, engine: TargetEngine, ids: Sequence[Sequence[int]]) -> float:
    found, features = subject.captured(engine, ids)
    _check_form(found, ids)
    errors = []
    for number, (each, got) in enumerate(zip(ids, features, strict=True)):
        assert got is not None
        assert got.input_ids_T.tolist() == list(each), f"the record of sample {number} has other tokens"
        errors.append(subject.features_error(got, each, f"sample {number} of {len(each)} tokens"))
    return max(errors)


def _check_form(found: Sequence[object], ids: Sequence[Sequence[int]]) -> None:
    assert len(found) == len(ids), f"{len(found)} results for {len(ids)} samples"
    for number, (each, result) in enumerate(zip(ids, found, strict=True)):
        reason = f": {result.reason}" if isinstance(result, Quarantined) else ""
        assert isinstance(result, RecordRef), f"sample {number} of {len(each)} tokens was not captured{reason}"
        assert result.record_id == f"sample {number}", f"result {number} is of {result.record_id!r}: another order"
        assert result.length == len(each), f"sample {number} has {len(each)} tokens, its record says {result.length}"


def features(subject: Subject) -> str:
    ids = _samples(subject)
    worst = _compare(subject, subject.capturing, ids)
    return f"{len(ids)} samples to {max(map(len, ids))} tokens, off by at most {worst:.1e} of {subject.tolerance:.0e}"


def one_by_one(subject: Subject) -> str:
    """Who else is in the batch changes nothing but rounding."""
    ids = _samples(subject)
    _, together = subject.captured(subject.capturing, ids)
    worst = 0.0
    for number, (each, beside) in enumerate(zip(ids, together, strict=True)):
        found, (alone,) = subject.captured(subject.capturing, [each])
        assert alone is not None, f"sample {number} was captured beside others, but not alone: {found[0]}"
        assert beside is not None, f"sample {number} was captured alone, but not beside others"
        what = f"sample {number} alone and in a batch"
        for mine, theirs in ((alone.taps_TNH, beside.taps_TNH), (alone.last_TH, beside.last_TH)):
            worst = max(worst, subject.error(what, mine.float(), theirs.float().cpu()))
    return f"{len(ids)} samples, off by at most {worst:.1e} of {subject.tolerance:.0e}"


def again(subject: Subject) -> str:
    """An engine that keeps prefixes has all of them the second time, and hands out whole records all the same."""
    ids = _samples(subject)
    worst = max(_compare(subject, subject.capturing, ids) for _ in range(2))
    return f"twice {len(ids)} samples, off by at most {worst:.1e}"


def pieces(subject: Subject) -> str:
    if subject.spec.pieces is None:
        return "declared absent: the engine reads every prompt whole (its spec names no `pieces`)"
    if subject.setting.process.get("url") is not None:
        raise NotHereError("attached to a running engine, whose options cannot be changed")
    ids = _samples(subject)
    engine = subject.engine(subject.taps, subject.spec.pieces)
    worst = max(_compare(subject, engine, ids) for _ in range(2))
    return f"{len(ids)} samples in pieces ({_told(subject.spec.pieces)}), off by at most {worst:.1e}"


def _told(options: object) -> str:
    return ", ".join(f"{name}={value}" for name, value in dict(options).items())  # type: ignore[call-overload]


def refusals(subject: Subject) -> str:
    """What no target can read is an error that names the sample, before anything is put; and the engine lives on."""
    good = [subject.tokens(20, 4), subject.tokens(31, 5)]
    bad = {
        "without tokens": [],
        "with a token beyond the vocabulary": [*subject.tokens(4, 1), subject.target.vocab_size],
        "with a negative token": [*subject.tokens(4, 1), -1],
    }
    said = ""
    for name, ids in bad.items():
        store = MemoryStore()
        requests = [CaptureRequest(record_id=f"bad{n}", input_ids=each) for n, each in enumerate([good[0], ids])]
        try:
            subject.capturing.capture(requests, subject.taps, store)
        except ValueError as error:
            said = str(error)
        else:
            raise AssertionError(f"a sample {name} is no ValueError")
        assert "bad1" in said, f"the error of a sample {name} does not name it: {said}"
        assert store.usage().records == 0, f"a batch with a sample {name} left a record behind"
    _compare(subject, subject.capturing, good)
    return f"{len(bad)} kinds refused, e.g. {said[:90]!r}"


def too_long(subject: Subject) -> str:
    """A sample longer than the target's context is quarantined with a reason, or captured whole: never cut."""
    most = subject.target.max_position_embeddings
    if most > LONGEST:
        raise NotHereError(f"the target takes {most} tokens; a sample beyond that is too large a check")
    good, long = subject.tokens(20, 4), subject.tokens(most + 1, 3)
    found, features = subject.captured(subject.capturing, [good, long])
    assert features[0] is not None, "a good sample beside one that is too long was not captured"
    subject.features_error(features[0], good, "a good sample beside one that is too long")
    result = found[1]
    if isinstance(result, Quarantined):
        assert result.reason.strip(), "it is quarantined without a reason"
        return f"{most + 1} tokens: quarantined, {result.reason[:90]!r}"
    assert features[1] is not None
    assert len(features[1].last_TH) == result.length == most + 1, "a sample that is too long was cut"
    return f"{most + 1} tokens: captured whole"


def order(subject: Subject) -> str:
    """Many short samples of mixed lengths, as a training asks for them."""
    lengths = torch.randint(1, 24, (48,), generator=torch.Generator().manual_seed(8)).tolist()
    ids = [subject.tokens(length, 1000 + n) for n, length in enumerate(lengths)]
    return f"{len(ids)} samples, off by at most {_compare(subject, subject.capturing, ids):.1e}"


CAPTURE = (
    Check("capture: taps and last hidden states", features, START),
    Check("capture: many samples in order", order, START),
    Check("capture: batch invariance", one_by_one, START),
    Check("capture: a second time", again, START),
    Check("capture: samples that no target reads", refusals, START),
    Check("capture: a sample that is too long", too_long, START),
    Check("capture: prompts read in pieces", pieces, START),
)
