"""Whether a run fits, and which options make it fit: each tried on the planner before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchspec.core.attention.volume import possible
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import Problem, TargetError
from torchspec.core.interfaces.engine import EngineSpec, TargetSpec
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.parallel_fit import parallel_problems
from torchspec.core.pipeline.plan_fit import Advice, Fit
from torchspec.core.pipeline.plan_load import Subject, least_held
from torchspec.core.pipeline.topology_fit import engine_fraction

LEAST_LENGTH = 64
MOST_RANKS = 8
"""On a device that ranks share, more are not proposed."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration on some ranks, and how it differs from the one asked for, in words of the command line."""

    config: RunConfig
    ranks: Ranks
    changes: tuple[str, ...] = ()

    def changed(self, section: str, *, ranks: Ranks | None = None, **values: Any) -> Variant:
        """With other values in a section, and maybe on other ranks."""
        part = getattr(self.config, section).model_copy(update=values)
        words = [f"{section}.{name}={str(value).lower()}" for name, value in values.items()]
        said = {word.partition("=")[0] for word in words}
        kept = [word for word in self.changes if word.partition("=")[0] not in said]
        if ranks is not None and ranks != self.ranks:
            words.insert(0, f"--nproc {ranks.all}")
        return Variant(
            config=self.config.model_copy(update={section: part}),
            ranks=ranks or self.ranks,
            changes=(*kept, *words),
        )


def fit_of(config: RunConfig, ranks: Ranks, subject: Subject) -> Fit:
    """The plan's verdict. What fits alone is preferred to combinations, and both to cutting samples."""
    given = Variant(config=config, ranks=ranks)
    need, available = subject.need(config, ranks), subject.available(config, ranks)
    if available is None or need.bytes <= available:
        return Fit(need=need, available=available)
    subject = replace(subject, backend=_asked_once(subject.backend, subject.models.spec))
    search = _Search(subject)
    ladders = [_recompute, _loss, _offload, _batch, _split, _share]
    alone = [found for ladder in ladders if (found := search.mildest(given, ladder)) is not None]
    if not alone:
        alone = [found for found in (search.together(given, ladders),) if found is not None]
    if not alone:
        alone = [found for found in (search.mildest(given, _cut), search.together(given, [*ladders, _cut])) if found][
            :1
        ]
    if alone:
        return Fit(need=need, available=available, advice=tuple(map(search.advice, alone)))
    return Fit(need=need, available=available, least=search.advice(search.strongest(given, [*ladders, _cut])))


def memory_problems(config: RunConfig, ranks: Ranks, subject: Subject) -> list[Problem]:
    """Of a run whose `train.memory_gb` is given, or which shares its device with an engine."""
    fit = fit_of(config, ranks, subject)
    if fit.fits:
        return []
    message = f"the run {fit.verdict()} (--dry-run shows what for)"
    remedies = fit.remedies()
    if config.train.memory_gb is not None:
        remedy = "; or ".join(remedies)
        return [Problem(field="train.memory_gb", value=config.train.memory_gb, message=message, remedy=remedy)]
    fraction = engine_fraction(config, subject.device.device_type)
    remedy = "; or ".join(["give the engine less of the device", *remedies])
    return [Problem(field="engine.memory_fraction", value=fraction, message=message, remedy=remedy)]


def _asked_once(backend: EngineSpec, target: TargetSpec) -> EngineSpec:
    """The same, with the answer to how it can split the target, which takes building its class."""
    if backend.tensor_parallel_sizes is None:
        return backend
    try:
        sizes = backend.tensor_parallel_sizes(target)
    except TargetError:
        sizes = (1,)
    return replace(backend, tensor_parallel_sizes=lambda _: sizes)


Ladder = Callable[[Variant, Subject], Iterator[Variant]]
"""Rungs of one option, the mildest first."""


@dataclass(frozen=True)
class _Search:
    subject: Subject

    def bytes(self, variant: Variant) -> int:
        return self.subject.need(variant.config, variant.ranks).bytes

    def fits(self, variant: Variant) -> bool:
        available = self.subject.available(variant.config, variant.ranks)
        return available is None or self.bytes(variant) <= available

    def advice(self, variant: Variant) -> Advice:
        return Advice(changes=variant.changes, bytes=self.bytes(variant))

    def mildest(self, given: Variant, ladder: Ladder) -> Variant | None:
        return next((rung for rung in self._rungs(given, ladder) if self.fits(rung)), None)

    def strongest(self, given: Variant, ladders: Sequence[Ladder]) -> Variant:
        """Each option in turn at the rung that leaves least, if it leaves less."""
        for ladder in ladders:
            given = min((given, *self._rungs(given, ladder)), key=self._excess)
        return given

    def together(self, given: Variant, ladders: Sequence[Ladder]) -> Variant | None:
        """As little as will do of the options that cost most, the last ones, then of the others."""
        strongest = self.strongest(given, ladders)
        if not self.fits(strongest):
            return None
        rest = list(ladders)
        while rest:
            ladder = rest.pop()
            rungs = (given, *self._rungs(given, ladder))
            found = next((rung for rung in rungs if self.fits(self.strongest(rung, rest))), None)
            if found is None:  # options meet each other: in another order they come to less
                return strongest
            given = found
        return given

    def _excess(self, variant: Variant) -> int:
        available = self.subject.available(variant.config, variant.ranks)
        return self.bytes(variant) - (available or 0)

    def _rungs(self, given: Variant, ladder: Ladder) -> Iterator[Variant]:
        for rung in ladder(given, self.subject):
            problems = parallel_problems(
                rung.config,
                rung.ranks.all,
                algorithm=self.subject.models.algorithm,
                backend=self.subject.backend,
                target=self.subject.models.spec,
            )
            if not problems:
                yield rung


def _recompute(given: Variant, subject: Subject) -> Iterator[Variant]:
    if not given.config.train.recompute:
        yield given.changed("train", recompute=True)


def _loss(given: Variant, subject: Subject) -> Iterator[Variant]:
    megabytes = given.config.train.loss_memory_mb or subject.loss_bytes // 10**6
    while megabytes > 1:
        megabytes //= 2
        yield given.changed("train", loss_memory_mb=megabytes)


def _offload(given: Variant, subject: Subject) -> Iterator[Variant]:
    """For a device whose memory is not the host's."""
    if not subject.on_host and given.config.train.offload != "all":
        for what in ("states", "activations", "all"):
            yield given.changed("train", offload=what)


def _batch(given: Variant, subject: Subject) -> Iterator[Variant]:
    """Smaller micro-batches, or shorter packed rows that still hold the longest sample."""
    config = given.config
    train, shared = config.train, config.parallel.ulysses * config.parallel.ring
    if train.tokens_per_rank is None:
        samples = min(train.micro_batch_size, train.batch_size)
        while samples > 1:
            samples //= 2
            yield given.changed("train", micro_batch_size=samples)
        return
    least, tokens = -(-config.data.max_length // shared), train.tokens_per_rank
    while tokens > least:
        tokens = max(least, tokens // 2)
        yield given.changed("train", tokens_per_rank=tokens)


def _share(given: Variant, subject: Subject) -> Iterator[Variant]:
    """More ranks for a sequence, by the exchange that holds least: those there are, then more of them."""
    config, shape = given.config, subject.models.algorithm.attention_shape
    shared = config.parallel.ulysses * config.parallel.ring
    for ranks in _more(given.ranks, subject):
        for width in (width for width in range(shared + 1, ranks.all + 1) if ranks.all % width == 0):
            if ranks is not given.ranks and width != ranks.all:
                continue  # ranks that are added are there to share
            rungs = []
            for ulysses in (ulysses for ulysses in range(1, width + 1) if width % ulysses == 0):
                sizes = {"ulysses": ulysses, "ring": width // ulysses}
                for exchange in possible(shape, **sizes):
                    rung = given.changed("parallel", ranks=ranks, **sizes, exchange=exchange)
                    held = least_held(rung.config, subject, ranks.all)
                    rungs.append((held(exchange), rung))
            least = min(rungs, key=lambda pair: pair[0])[1]
            tokens = config.train.tokens_per_rank
            # The same packed row over more ranks.
            yield least if tokens is None else least.changed("train", tokens_per_rank=-(-tokens * shared // width))


def _more(ranks: Ranks, subject: Subject) -> Iterator[Ranks]:
    yield ranks
    most = MOST_RANKS if "ranks_share_device" in subject.device.capabilities else subject.devices
    if ranks.all == ranks.here and not ranks.launched:
        count = 2 * ranks.all
        while count <= most:
            yield replace(ranks, all=count, here=count)
            count *= 2


def _split(given: Variant, subject: Subject) -> Iterator[Variant]:
    sizes = subject.backend.tensor_parallel_sizes
    for count in sizes(subject.models.spec) if sizes is not None else ():
        if count > given.config.target.tensor_parallel:
            yield given.changed("target", tensor_parallel=count)


def _cut(given: Variant, subject: Subject) -> Iterator[Variant]:
    """Samples an eighth shorter each time, in multiples of 64 tokens; packed rows become no longer than one of them."""
    config = given.config
    tokens, shared = config.train.tokens_per_rank, config.parallel.ulysses * config.parallel.ring
    length = config.data.max_length
    if subject.lengths is not None:
        length = min(length, subject.lengths.longest)
    while length > LEAST_LENGTH:
        length = max(LEAST_LENGTH, (length * 7 // 8) // LEAST_LENGTH * LEAST_LENGTH)
        cut = given.changed("data", max_length=length)
        yield cut if tokens is None else cut.changed("train", tokens_per_rank=min(tokens, -(-length // shared)))
