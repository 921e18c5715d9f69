"""What a training step holds, from shapes alone: the draft, the target, a micro-batch and its loss."""

from __future__ import annotations

import math
from dataclasses import replace
from math import prod

from torchspec.core.objectives.chunks import LossShape, chunk_rows
from torchspec.core.pipeline.plan_terms import LARGE_BLOCK, MOMENTS, Load, Models, Moment, Part, part_of
from torchspec.core.training.low_bit import state_bytes

STEP: tuple[Moment, ...] = MOMENTS[:-1]
DRAFT: tuple[Moment, ...] = ("loss", "backward")
FP32 = 4


def draft_parts(models: Models, load: Load) -> list[Part]:
    ranks, compute, trained = load.ranks, load.compute.itemsize, models.trained
    tensors = [prod(shape) for shape in models.draft]
    on_device = load.offload not in ("states", "all")
    shards = [FP32 * count // ranks for count in tensors] if on_device else []
    over = f"fp32 over {ranks} rank(s)" if on_device else "on the host"
    # Gradients of one micro-batch stay whole until those of the last one are there.
    waiting: tuple[Moment, ...] = STEP if load.several else ("reduction",)
    packed = [FP32 * trained, FP32 * trained // ranks]
    if ranks == 1:
        packed.append(FP32 * trained)  # the sum over one rank is a copy, scaled in another one
    in_fp8 = models.fp8_gathered if load.fp8_gather else 0
    if in_fp8 and load.memory.shard_logits == "vocabulary":
        in_fp8 -= models.fp8_head
    wide = compute * (trained - in_fp8)
    whole = [in_fp8, wide] if in_fp8 else [compute * n for n in tensors]
    return [
        part_of("draft parameters", shards, f"{trained:,} in {over}"),
        _moments(shards, over, load),
        part_of(
            "gathered parameters",
            whole,
            "the whole draft in its compute precision" + (f", but for {in_fp8:,} in FP8" if in_fp8 else ""),
            DRAFT,
        ),
        part_of(
            "weights in FP8",
            [models.fp8 - in_fp8, models.fp8] if load.fp8 else [],
            f"{models.fp8:,} elements by rows and by columns" + (", by rows as they were gathered" if in_fp8 else ""),
            (*DRAFT, "reduction"),
        ),
        part_of("gathering", [in_fp8 + wide if ranks > 1 else 0], "what came from the ranks, before it was cut", DRAFT),
        part_of(
            "gradients before reduction",
            [(FP32 if load.several else compute) * n for n in tensors],
            "of the whole draft" + (", kept over the micro-batches of a step" if load.several else ""),
            waiting,
        ),
        part_of("reduction", packed, "gradients packed for the sum over ranks, and this rank's sum", ("reduction",)),
        part_of("gradients", shards, over, ("optimizer",)),
        part_of("update", [2 * max(shards, default=0)], "temporaries of the largest tensor", ("optimizer",)),
    ]


def _moments(shards: list[int], over: str, load: Load) -> Part:
    if load.optimizer == "adamw" or not shards:
        return part_of("optimizer state", 2 * shards, f"two moments, {over}")
    coded = [state_bytes(size // FP32) for size in shards]
    return part_of("optimizer state", 2 * coded, f"two moments in 8 bits where they fit, over {load.ranks} rank(s)")


def target_parts(models: Models, load: Load) -> list[Part]:
    spec, size, parallel = models.spec, load.target_dtype.itemsize, load.tensor_parallel
    end = spec.vocab_size * spec.hidden_size * size
    head = 0 if spec.tie_word_embeddings else end // load.head_ranks
    own = "the trainer's own" + (f", the head{_over(load.head_ranks)}" if head else "")
    ends = part_of("target embedding and head", [end, head], own)
    if not models.target:  # its engine runs in a process of its own
        return [ends]
    if models.kept:
        total = sum(models.kept)
        return [part_of("target model", models.kept, f"{total:,} bytes, quantised as they are stored"), ends]
    elements = sum(map(prod, models.target))
    if not models.mapped or parallel > 1:
        tensors = [size * prod(shape) // parallel for shape in models.target]
        return [part_of("target model", tensors, f"{elements:,} x {size} bytes{_over(parallel)}"), ends]
    # Pages come when they are read, and the engine never reads the head.
    pages = elements * size - (0 if spec.tie_word_embeddings else end)
    how = f"pages of its files: {elements:,} x {size} bytes" + ("" if spec.tie_word_embeddings else ", less the head")
    return [Part(name="target model", bytes=pages, how=how, returned=pages), replace(ends, returned=ends.bytes)]


def _over(ranks: int) -> str:
    return f" over {ranks} ranks" if ranks > 1 else ""


def micro_batch_parts(models: Models, load: Load) -> list[Part]:
    algorithm, spec = models.algorithm, models.spec
    size, taps = load.target_dtype.itemsize, len(algorithm.taps)
    hidden = spec.hidden_size * size
    heads = spec.num_attention_heads * spec.head_dim
    widest = max(3 * spec.intermediate_size, 4 * heads) * size // load.tensor_parallel
    arriving = [load.captured * hidden * (taps + 1)]
    recorded = [load.captured * hidden] * taps
    layer = [load.captured * hidden] * 2 + [load.captured * widest // 3] * 3
    copies = [load.captured * hidden] * (taps + 1)
    passing = max(layer, copies, key=sum)
    forward = f"{load.captured:,} tokens: taps and the widest layer, or its copies"
    features = f"{load.rows:,} tokens x ({taps} taps + last) x {spec.hidden_size} x {size} bytes"
    ran = part_of("target's forward pass", [*recorded, *passing], forward, ("capture",))
    if not models.target:
        ran = part_of("records of the engine", arriving, f"{load.captured:,} tokens, mapped to be copied", ("capture",))
    found = [
        ran,
        part_of("features", [load.rows * hidden * taps, load.rows * hidden], features, STEP),
    ]
    if not models.target and models.process is None:  # on an accelerator: `core.training.uploading`
        found.append(part_of("features of the next pass", arriving, "uploaded beside this one", STEP))
    for name, how, count, moments in _activations(models, load):
        total = int(load.rows * count * load.compute.itemsize)
        large = int(total * _large_share(models, load.rows * load.compute.itemsize))
        found.append(Part(name=name, bytes=total, how=how, moments=moments, returned=large))
    if load.held:
        how = f"of other ranks, exchanged by {load.exchange}"
        found.append(part_of("keys and values", [load.held // 4] * 4, how, DRAFT))
    return found


def _activations(models: Models, load: Load) -> list[tuple[str, str, float, tuple[Moment, ...]]]:
    algorithm, recompute = models.algorithm, load.memory.recompute
    shape = algorithm.attention_shape
    kept = algorithm.kept_values(recompute=recompute, moment="loss", text=load.text)
    passing = algorithm.kept_values(recompute=recompute, text=load.text) - kept
    again = ", the rest made again" if recompute else ""
    if load.offload in ("activations", "all"):
        kept, again = 2 * kept / (shape.steps * shape.layers), ", the rest on the host"
    return [
        ("activations", f"{load.rows:,} tokens x {kept:,.0f} values{again}", kept, DRAFT),
        ("gradients of activations", f"{load.rows:,} tokens x {passing:,.0f} values in flight", passing, ("backward",)),
    ]


def _large_share(models: Models, column: int) -> float:
    """Which part of the activations is in large blocks: they are as wide as what the draft's matrices return."""
    head = models.algorithm.vocabulary_size
    widths = [shape[0] for shape in models.draft if len(shape) == 2 and shape[0] != head]
    large = sum(width for width in widths if width * column >= LARGE_BLOCK)
    return large / sum(widths) if widths else 0.0


def loss_parts(models: Models, load: Load) -> list[Part]:
    wide = max(FP32, load.compute.itemsize)
    shape = LossShape(
        steps=models.algorithm.loss_steps,
        hidden=models.spec.hidden_size,
        draft_vocabulary=models.algorithm.vocabulary_size,
        target_vocabulary=models.spec.vocab_size,
        itemsize=load.target_dtype.itemsize,
        ranks=load.head_ranks,
        shard_logits=load.memory.shard_logits,
    )
    assert load.memory.loss_bytes is not None
    # Chunks are cut for rows that teach as many pairs as they can; of texts with few anchors they teach fewer.
    taught = math.ceil(shape.steps * models.algorithm.attention_shape.share(load.text))
    row = loss_row(replace(shape, steps=taught))
    chunks = -(-load.rows // chunk_rows(shape, load.memory.loss_bytes))
    rows = -(-load.rows // chunks)  # they are cut as equal as they can be
    logits = rows * taught * shape.draft_vocabulary * wide
    loss = [logits, *_blocks(rows * row - logits)]
    states = load.rows * models.spec.hidden_size * load.target_dtype.itemsize
    copied = load.compute.itemsize < wide and not load.fp8
    return [
        part_of("loss", loss, f"{rows:,} target rows at a time x {row:,} bytes", ("loss",)),
        part_of("target's states that teach", [states], "a copy of the supervised rows", ("loss",)),
        part_of("gradient of the draft's head", [models.head * wide], "made with the loss, fp32", DRAFT),
        part_of("the same, scaled", [models.head * load.compute.itemsize], "a second copy", ("backward",)),
        part_of("draft's head in fp32", [models.head * wide * copied], "for products summed in fp32", ("loss",)),
    ]


def loss_row(shape: LossShape) -> int:
    """Bytes that a target row takes while the loss works on it."""
    budget = 1 << 50
    return budget // chunk_rows(shape, budget)


def _blocks(total: int) -> list[int]:
    """In blocks that malloc keeps."""
    whole, rest = divmod(max(0, total), LARGE_BLOCK // 2)
    return [LARGE_BLOCK // 2] * whole + [rest]
