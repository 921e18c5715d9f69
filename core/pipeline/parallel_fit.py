"""How ranks are to share sequences, rows and the target: whether the configuration allows it, and what `auto` means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from torchspec.core.attention.ulysses import heads_fit
from torchspec.core.attention.volume import Traffic, choose, possible
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import Problem, TargetError
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import EngineSpec, TargetSpec
from torchspec.core.ops.fp8 import filled
from torchspec.core.parallel.sequence import Exchange

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}

LogitsForm = Literal["off", "tokens", "vocabulary"]


def parallel_problems(
    config: RunConfig,
    ranks: int,
    *,
    algorithm: Algorithm | None = None,
    backend: EngineSpec | None = None,
    target: TargetSpec | None = None,
) -> list[Problem]:
    """Of `ranks` in all; what is not known yet is not judged."""
    found = [*_division_problems(config, ranks), *_packing_problems(config)]
    if algorithm is not None:
        found += _exchange_problems(config, algorithm, ranks)
    found += _target_problems(config, ranks, backend, target)
    return found


def _sequence_ranks(config: RunConfig) -> int:
    return config.parallel.ulysses * config.parallel.ring


def _division_problems(config: RunConfig, ranks: int) -> list[Problem]:
    parallel = config.parallel
    if ranks % _sequence_ranks(config) == 0:
        return []
    works = [f"{u} x {p // u}" for p in _divisors(ranks) if p > 1 for u in _divisors(p)]
    given = f"groups of parallel.ulysses={parallel.ulysses} x parallel.ring={parallel.ring}"
    return [
        Problem(
            field="parallel",
            message=f"{ranks} rank(s) cannot be divided into {given}",
            remedy=(f"ulysses x ring may be {', '.join(works)} with {ranks} ranks" if works else "")
            or f"start {_sequence_ranks(config)} ranks, or a multiple of it (--nproc)",
        )
    ]


def _packing_problems(config: RunConfig) -> list[Problem]:
    train, ranks = config.train, _sequence_ranks(config)
    if train.tokens_per_rank is None:
        return []
    found = []
    if train.tokens_per_rank * ranks < config.data.max_length:
        found.append(
            Problem(
                field="train.tokens_per_rank",
                value=train.tokens_per_rank,
                message=f"a row holds {train.tokens_per_rank * ranks} tokens over {ranks} rank(s), and a sample may "
                f"have data.max_length={config.data.max_length}",
                remedy=f"give {-(-config.data.max_length // ranks)} or more, or data.max_length="
                f"{train.tokens_per_rank * ranks} or less",
            )
        )
    if "micro_batch_size" in train.model_fields_set:
        found.append(
            Problem(
                field="train.micro_batch_size",
                value=train.micro_batch_size,
                message="with train.tokens_per_rank a forward pass is one packed row, however many samples it holds",
                remedy="leave one of the two out",
            )
        )
    return found


def _exchange_problems(config: RunConfig, algorithm: Algorithm, ranks: int) -> list[Problem]:
    parallel, shape = config.parallel, algorithm.attention_shape
    if _sequence_ranks(config) == 1 and parallel.exchange != "auto":
        return [
            Problem(
                field="parallel.exchange",
                value=parallel.exchange,
                message="no ranks share a sequence: parallel.ulysses and parallel.ring are 1",
                choices=("auto",),
            )
        ]
    if parallel.exchange in ("auto", *possible(shape, parallel.ulysses, parallel.ring)):
        return []
    other = {"ulysses": "ring", "ring": "ulysses"}.get(parallel.exchange, "")
    if getattr(parallel, other, 1) == 1:  # then it is the heads
        shared = ((u, u * parallel.ring) for u in _divisors(ranks))
        divisors = (u for u, size in shared if size > 1 and ranks % size == 0)
        works = [str(u) for u in divisors if heads_fit(shape.query_heads, shape.key_heads, u)]
        return [
            Problem(
                field="parallel.ulysses",
                value=parallel.ulysses,
                message=f"so many ranks cannot share the draft's {shape.query_heads} query and {shape.key_heads} key "
                "heads",
                choices=tuple(works),
                remedy="or parallel.exchange=gather, which leaves heads together",
            )
        ]
    return [
        Problem(
            field="parallel.exchange",
            value=parallel.exchange,
            message=f"is for parallel.{other}=1, not {getattr(parallel, other)}",
            choices=("auto", *possible(shape, parallel.ulysses, parallel.ring)),
        )
    ]


def _target_problems(
    config: RunConfig, ranks: int, backend: EngineSpec | None, target: TargetSpec | None
) -> list[Problem]:
    found = []
    size, shared = config.target.tensor_parallel, _sequence_ranks(config)
    sizes: Sequence[int] = ()
    if size > 1 and backend is not None:
        if backend.tensor_parallel_sizes is None:
            message = f"backend {backend.name} does not hold a target on the trainer's own ranks"
            remedy = "leave it at 1, or use a backend that does, such as hf"
            found.append(Problem(field="target.tensor_parallel", value=size, message=message, remedy=remedy))
        elif target is not None:
            try:
                sizes = backend.tensor_parallel_sizes(target)
            except TargetError as error:
                found.append(Problem(field="target.tensor_parallel", value=size, message=str(error)))
    if size > 1 and not found:
        fitting = [n for n in sizes or _divisors(ranks) if ranks % n == 0 and n % shared == 0 and n > 1]
        if (sizes and size not in sizes) or ranks % size or size % shared:
            found.append(
                Problem(
                    field="target.tensor_parallel",
                    value=size,
                    message=f"must divide the {ranks} rank(s), hold whole groups of {shared} that share a sequence, "
                    "and divide the target's heads",
                    choices=("1", *map(str, fitting)),
                )
            )
    return [*found, *_logits_problems(config, ranks, target)]


def _logits_problems(config: RunConfig, ranks: int, target: TargetSpec | None) -> list[Problem]:
    if config.target.shard_logits not in ("tokens", "vocabulary"):
        return []
    width = logits_ranks(config, ranks)
    if width == 1:
        return [
            Problem(
                field="target.shard_logits",
                value=config.target.shard_logits,
                message="there is one rank, which has nobody to share the target's head with",
                choices=("auto", "off"),
            )
        ]
    if target is not None and target.vocab_size < width:
        message = f"{width} ranks cannot share a vocabulary of {target.vocab_size}"
        return [Problem(field="target.shard_logits", value=config.target.shard_logits, message=message)]
    return []


def logits_ranks(config: RunConfig, ranks: int) -> int:
    """How many ranks the target's head is spread over: those that hold the target together, else that share a sequence,
    else all."""
    if config.target.tensor_parallel > 1:
        return config.target.tensor_parallel
    return _sequence_ranks(config) if _sequence_ranks(config) > 1 else ranks


def choose_logits(config: RunConfig) -> tuple[LogitsForm, str]:
    """What `target.shard_logits` comes to, and why if it was `auto`."""
    asked = config.target.shard_logits
    if asked != "auto":
        return asked, ""
    if config.target.tensor_parallel == 1:
        return "off", ""
    return "tokens", f"{config.target.tensor_parallel} ranks hold the target together, so each holds a part of its head"


def row_tokens(config: RunConfig, ranks: int, longest: int | None = None) -> int:
    """Positions of one forward pass on one rank, at most; `longest` is the longest sample's length where known."""
    train, shared = config.train, _sequence_ranks(config)
    length = longest or config.data.max_length
    if train.tokens_per_rank is not None:
        return min(train.tokens_per_rank, -(-train.batch_size * length // shared))  # no row holds more than a batch
    data = max(1, ranks // shared)
    samples = min(train.micro_batch_size, math.ceil(train.batch_size / data))
    own = -(-length // shared)
    return samples * (filled(own) if config.precision.compute == "fp8" else own)


def choose_exchange(
    config: RunConfig, algorithm: Algorithm, ranks: int, longest: int | None = None
) -> tuple[Exchange, str]:
    """What `parallel.exchange` comes to, and why if it was `auto`."""
    parallel = config.parallel
    if parallel.exchange != "auto":
        return parallel.exchange, ""
    if _sequence_ranks(config) == 1:
        return "gather", ""
    rows, itemsize = row_tokens(config, ranks, longest), COMPUTE[config.precision.compute].itemsize
    text, shape = longest or config.data.max_length, algorithm.attention_shape
    traffic = Traffic(
        rows=rows,
        queries=shape.queries(rows, text),
        itemsize=itemsize,
        shape=shape,
        ulysses=parallel.ulysses,
        ring=parallel.ring,
    )
    kept = algorithm.kept_values(recompute=config.train.recompute, text=text)
    activations = int(rows * kept * itemsize)
    return choose(traffic, activations)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
