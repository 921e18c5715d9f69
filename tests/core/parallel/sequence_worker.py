"""Training windows whose sequences ranks share: `sequence_worker.py cells.json results/ ranks port`.

The ranks are forks of one process; each runs every cell. A cell is a window of ragged documents through a small EAGLE-3
draft, its target's features made up from the tokens. Rank 0 writes the summed loss, metrics and gradients, of the last
of `windows` over the same documents without an update between.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP imports it: once here instead of in every fork
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from torchspec.core import registry
from torchspec.core.attention.volume import Traffic
from torchspec.core.data.batches import MicroBatch
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.algorithm import Moment, StepMemory, TrainingSample
from torchspec.core.interfaces.device import Communication
from torchspec.core.interfaces.engine import CaptureRequest, TargetSpec
from torchspec.core.interfaces.features import Captured, Features, Quarantined
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.core.parallel import mesh
from torchspec.core.parallel.sequence import gather_sequence
from torchspec.core.training import offload
from torchspec.core.training.capturing import Documents as FullDocuments
from torchspec.core.training.capturing import Model, captured_rows
from torchspec.core.training.feed import DirectFeed
from torchspec.core.training.fp8 import Fp8Compute, Gathering
from torchspec.core.training.plan import Cut, Turn
from torchspec.core.training.random_state import draw_of
from torchspec.core.training.sharding import shard_draft
from torchspec.core.training.timing import StepTimer
from torchspec.core.training.window import run_window

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

Cell = dict[str, Any]
H, V, HEADS, TAPS = 32, 90, 8, (1, 3, 4)
LENGTHS = (23, 5, 61, 2, 34, 17, 48, 9)
DEADLINE = timedelta(seconds=120)


@dataclass(frozen=True)
class Documents:
    """Ragged documents. `dense`: every token is supervised; `sparse`: short spans, and the longest document's middle
    and end teach nothing, so that some ranks have no supervised token; `none`: nothing is."""

    supervision: str
    unsupervised: Sequence[int] = ()
    lengths: Sequence[int] = LENGTHS

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TrainingSample:
        length = self.lengths[index]
        ids_T = torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(index))
        place_T = torch.arange(length)
        mask_T = torch.ones(length, dtype=torch.bool)
        if self.supervision == "sparse":
            mask_T = (place_T % 9 > 5) & (place_T < 20)
        if self.supervision == "none" or index in self.unsupervised:
            mask_T = torch.zeros_like(mask_T)
        return TrainingSample(sample_id=f"row-{index}", input_ids_T=ids_T, loss_mask_T=mask_T)


@dataclass(frozen=True)
class MadeUpTarget:
    """Features that depend on the document's tokens alone; of documents of the lengths `fails` there are none."""

    dtype: torch.dtype
    fails: Sequence[int] = ()

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: MemoryStore) -> list[Captured]:
        references: list[Captured] = []
        for request in batch:
            ids_T = torch.tensor(request.input_ids)
            if len(ids_T) in self.fails:
                references.append(Quarantined(record_id=request.record_id, reason=f"length {len(ids_T)}"))
                continue
            generator = torch.Generator().manual_seed(int((ids_T * torch.arange(1, len(ids_T) + 1)).sum()))
            taps_TNH = torch.randn(len(ids_T), len(taps), H, generator=generator, dtype=torch.float64)
            last_TH = torch.randn(len(ids_T), H, generator=generator, dtype=torch.float64)
            features = Features(
                input_ids_T=ids_T,
                taps_TNH=taps_TNH.to(self.dtype),
                last_TH=last_TH.to(self.dtype),
                tap_layers=tuple(taps),
                norm_state="post_norm",
            )
            references.append(sink.put(request.record_id, features))
        return references


class SharedHead:
    """A `TargetHead` of which the step may read this rank's rows alone."""

    def __init__(self, whole: SafetensorsTargetHead, shards: VocabularyShards) -> None:
        start, stop = shards.bounds(shards.rank)
        self.rows = whole.rows
        self.shards, self.shard_VH = shards, whole.head_VH[start:stop].clone()
        self.embedding_VH, self.normed, self.finished = whole.embedding_VH, whole.normed, whole.finished


def make_model(cell: Cell, context: mesh.ParallelContext) -> Model:
    dtype, kv_heads = getattr(torch, cell["dtype"]), cell.get("kv_heads", 4)
    spec = TargetSpec(
        path=Path("made-up"),
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=8,
        hidden_size=H,
        intermediate_size=48,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=8,
        vocab_size=V,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        dtype=dtype,
        tie_word_embeddings=False,
        eos_token_ids=(0,),
    )
    trained = registry.algorithms().spec(cell.get("algorithm", "eagle3"))
    options = {**cell.get("steps", {"unroll": 3}), **cell.get("options", {})}
    size = cell.get("draft_vocabulary", 60)
    algorithm = trained.create(trained.options(vocab_size=size, **options), spec)
    ids_N = torch.arange(V)[torch.arange(V) % 3 != 1][:size]
    torch.manual_seed(0)
    ends = torch.randn(2, V, H, dtype=torch.float64)
    head: Any = SafetensorsTargetHead(
        embedding_VH=ends[0].to(dtype), head_VH=(0.3 * ends[1]).to(dtype), final_norm=nn.Identity()
    )
    if "shard_logits" in cell:
        shards = VocabularyShards(group=context.logits_group, communication=context.device.communication, target_size=V)
        head = SharedHead(head, shards)
    draft = algorithm.build_draft(VocabularyMap(ids_N=ids_N, target_size=V), head)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif not parameter.any():  # behind it no gradient would be seen
                parameter.normal_(std=0.1)
    bf16 = dtype == torch.bfloat16
    return Model(
        algorithm=algorithm,
        draft=shard_draft(
            draft.to(torch.float32 if bf16 else dtype),
            context,
            "bfloat16" if bf16 else "float32",
            states_on_host=cell.get("offload", False),
            gather=Gathering(scaling=cell["fp8"], head_in_parts=cell.get("shard_logits") == "vocabulary")
            if cell.get("fp8_gather")
            else None,
        ),
        head=head,
        engine=MadeUpTarget(dtype, [LENGTHS[index] for index in cell.get("fails", ())]),  # type: ignore[arg-type]
        memory=StepMemory(recompute=cell.get("recompute", False), shard_logits=cell.get("shard_logits", "tokens")),
        exchange=cell.get("exchange", "gather"),
        offload_activations=cell.get("offload", False),
        fp8=Fp8Compute(scaling=cell["fp8"]) if "fp8" in cell else None,
    )


def of_documents(moment: Moment, documents: FullDocuments) -> Moment:
    return replace(moment, draws=tuple(draw_of(0, 0, sample.sample_id) for sample in documents.samples))


def run(cell: Cell, results: Path, context: mesh.ParallelContext) -> None:
    model = make_model(cell, context)
    documents = Documents(cell.get("supervision", "dense"), cell.get("unsupervised", ()))
    tokens = cell.get("row_tokens")
    cut = Cut(micro_batch_size=cell.get("micro_batch_size", 3), row_tokens=tokens, equal_length=50.0)
    batch = cell.get("batch", list(range(len(documents))))
    shares = {i: cut.micro_batches(batch, documents.lengths, i, context.data_size) for i in context.captured_with}
    turns = [
        Turn(step=0, number=number, micro_batches={i: share[number] for i, share in shares.items()}, some=0)
        for number in range(len(shares[context.data_rank]))
    ]
    moment = Moment(progress=0.25)
    for _ in range(cell.get("windows", 1)):
        model.draft.zero_grad()
        feed, timer = DirectFeed(model, context), StepTimer(context.torch_device)
        window = run_window(model, documents, turns, feed, context, timer, partial(of_documents, moment))
        moment = replace(moment, previous={name: window.sums.metrics[name] for name in model.algorithm.remembers})
    tensors = {f"sum.{name}": value for name, value in window.sums.values.items()}
    tensors["tokens"] = torch.tensor(window.sums.tokens - sum(LENGTHS[index] for index in documents.unsupervised))
    if model.fp8 is not None:
        tensors["positions"] = torch.tensor(window.sums.positions)
    reasons = {index: f"length {LENGTHS[index]}" for index in cell.get("fails", ())}
    assert window.quarantined == reasons, window.quarantined
    for name, parameter in model.draft.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        tensors[f"grad.{name}"] = parameter.grad.full_tensor()
    if context.is_main:
        save_file({name: t.contiguous() for name, t in tensors.items()}, results / f"{cell['name']}.safetensors")


class Counting:
    """A `Communication` that counts the bytes this rank sends to others."""

    def __init__(self, inner: Communication) -> None:
        self.inner, self.sent = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def all_to_all(self, parts: Sequence[Tensor], group: Any, rows: Sequence[int] | None = None) -> list[Tensor]:
        self.sent += sum(part.nbytes for rank, part in enumerate(parts) if rank != group.rank())
        return self.inner.all_to_all(parts, group, rows)

    def all_gather(self, tensor: Tensor, group: Any) -> list[Tensor]:
        self.sent += tensor.nbytes * (group.size() - 1)
        return self.inner.all_gather(tensor, group)

    def reduce_scatter(self, parts: Sequence[Tensor], group: Any) -> Tensor:
        self.sent += sum(part.nbytes for rank, part in enumerate(parts) if rank != group.rank())
        return self.inner.reduce_scatter(parts, group)

    def ring_exchange(self, tensor: Tensor, group: Any) -> Any:
        self.sent += tensor.nbytes * (group.size() > 1)
        return self.inner.ring_exchange(tensor, group)


def count_bytes(cell: Cell, results: Path, context: mesh.ParallelContext) -> None:
    """Sent in one dense micro-batch, and what `Traffic` says of it."""
    model = make_model(cell, context)
    documents = FullDocuments.of(MicroBatch.rows([2, 4]), Documents("dense"), 0)
    rows, _ = captured_rows(model, {context.data_rank: documents}, context)
    assert rows.sequence is not None
    counting = Counting(context.device.communication)
    rows = replace(rows, sequence=replace(rows.sequence, communication=counting))  # type: ignore[arg-type]
    kept: dict[int, int] = {}

    own = rows.layout.rows
    spread = rows.layout.padded if cell["exchange"] == "gather" else own * cell["ulysses"]

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.shape[1] == spread > own and tensor.shape[3] == 8:
            kept[tensor.data_ptr()] = tensor.nbytes  # heads at the positions of several ranks
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.algorithm.step(model.draft, model.head, rows, context.device, model.memory)
    result.numerator.backward()
    slots, shape = len(documents.packs) * own, model.algorithm.attention_shape
    traffic = Traffic(
        rows=slots,
        queries=shape.queries(slots, None),
        itemsize=8,
        shape=shape,
        ulysses=cell["ulysses"],
        ring=cell["ring"],
    )
    walk = slots * (context.sequence_size - 1)  # prefix lengths, a byte each
    counts = {
        "sent": counting.sent - walk,
        "formula": traffic.sent(cell["exchange"]),
        "kept": sum(kept.values()),
        "kept by formula": traffic.kept(cell["exchange"]),
    }
    found = {name: torch.tensor(count) for name, count in counts.items()}
    save_file(found, results / f"{cell['name']}-{context.rank}.safetensors")


def gather(cell: Cell, results: Path, context: mesh.ParallelContext) -> None:
    """Each rank weighs the gathered whole in its own way."""
    sequence = context.sequence_group("gather")
    assert sequence is not None
    layout = sequence.layout(cell["length"])
    whole_BT = torch.arange(2.0 * cell["length"], dtype=torch.float64).view(2, -1)
    mine = layout.cut(whole_BT, sequence.rank).flatten(1).requires_grad_()
    gathered = gather_sequence(mine, layout, sequence)
    weight_BT = (gathered.detach() + 1) * (sequence.rank + 1)
    (gathered * weight_BT).sum().backward()
    assert mine.grad is not None
    tensors = {"gathered": gathered.detach(), "positions": layout.positions(sequence.rank), "grad": mine.grad}
    save_file({n: t.contiguous() for n, t in tensors.items()}, results / f"{cell['name']}-{context.rank}.safetensors")


KINDS = {"window": run, "bytes": count_bytes, "gather": gather}


def rank_main(cells: list[Cell], results: Path, rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    offload.SMALLEST_BYTES = 0
    meshes = forked["Meshes"](rank, ranks, port, DEADLINE)
    for cell in cells:
        try:
            context = meshes.context(cell.get("ulysses", 1), cell.get("ring", 1))
            KINDS[cell.get("kind", "window")](cell, results, context)
        except Exception:
            (results / f"{cell['name']}.{rank}.error").write_text(traceback.format_exc())
            raise
    dist.destroy_process_group()


def main() -> int:
    cells, results, ranks, port = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:])
    failed: int = forked["run_ranks"](rank_main, [(cells, results, rank, ranks, port) for rank in range(ranks)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
