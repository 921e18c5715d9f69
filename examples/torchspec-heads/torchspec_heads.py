"""Parallel heads (after Medusa, 2401.10774): K maps of the target's last tap and the newest token, a token each.

Step k of slot i predicts x_{i+2+k} from [tap_i ; embedding of x_{i+1}], by the target's own head. Batches, loss and
metrics are torchspec's: with them come packing, sequence parallelism and a target's head that ranks share.
"""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass

import torch
from pydantic import Field
from torch import nn

from torchspec.core.algorithms.base import DraftAlgorithm
from torchspec.core.algorithms.blocks.drafter import pick
from torchspec.core.algorithms.eagle3.batch import Plan, build_batch, halo
from torchspec.core.algorithms.eagle3.metrics import pair_sums
from torchspec.core.algorithms.lesson import lesson_of, result_of
from torchspec.core.config.schema import Positive
from torchspec.core.export.draft_tensors import load_stored
from torchspec.core.interfaces.algorithm import KEEP_ALL, START, AlgorithmSpec, AttentionShape, DraftFiles, Proposal
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.objectives.distillation import Head, distil
from torchspec.core.objectives.frozen import FrozenHead
from torchspec.core.objectives.terms import ObjectiveOptions


class HeadsOptions(ObjectiveOptions):
    steps: Positive = Field(4, description="tokens drafted at once, a map each")


Geometry = make_dataclass("Geometry", ["steps", "hidden_size", "vocab_size"], frozen=True, kw_only=True)


class HeadsDraft(nn.Module):
    def __init__(self, geometry):
        super().__init__()
        size = geometry.hidden_size
        self.maps = nn.ModuleList(nn.Linear(2 * size, size, bias=False) for _ in range(geometry.steps))
        self.norm_weight = nn.Parameter(torch.ones(size))
        self.rows, self.vocabulary = FrozenHead(), VocabularyMap.identity(geometry.vocab_size)

    def outputs(self, tap, token, embedding_VH):
        both = torch.cat((tap, nn.functional.embedding(token, embedding_VH)), dim=-1).to(self.norm_weight.dtype)
        return [tap.to(both.dtype) + linear(both) for linear in self.maps]

    def forward(self, inputs, target, shard_logits, objective):
        tap_BQH = inputs.slots.take(inputs.taps_BSF.to(target.embedding_VH.device))
        token_BQ = inputs.slots.take(inputs.tokens_BX[..., None], 1)[..., 0]
        outputs = self.outputs(tap_BQH, token_BQ, target.embedding_VH)
        rows_NH, is_part = self.rows.rows(target, self.vocabulary, self.norm_weight.dtype, shard_logits)
        head = Head(norm_H=self.norm_weight, head_NH=rows_NH, eps=1e-6, is_part=is_part)
        return objective([output.flatten(0, 1) for output in outputs], head)


@dataclass(frozen=True, kw_only=True)
class Heads(DraftAlgorithm):
    name: str = "heads"
    layouts = ("plain",)
    decay = 0.8
    vocabulary_size = property(lambda self: self.geometry.vocab_size)
    halo = property(lambda self: halo(self.geometry.steps))
    loss_steps = property(lambda self: self.geometry.steps)
    attention_shape = AttentionShape(query_heads=1, key_heads=1, head_size=1, steps=1)  # there is none

    def kept_values(self, *, recompute, moment="backward", text=None):
        return (2 + 3 * self.geometry.steps) * self.geometry.hidden_size

    def build_draft(self, vocabulary, head):
        return HeadsDraft(self.geometry)

    def plan(self, head, loss_bytes, memory=KEEP_ALL):
        return Plan(steps=self.geometry.steps, **self.taught_by(head, loss_bytes, memory))

    def assemble(self, rows, plan, moment):
        return build_batch(rows, plan)

    def run(self, draft, head, batch, device, memory=KEEP_ALL, moment=START):
        lesson = lesson_of(self.options, batch, head, draft.vocabulary, device, memory, moment, decay=self.decay)

        def objective(outputs, output_head):
            numerator, terms = distil(outputs, output_head, lesson.supervision, device.ops)
            return numerator, pair_sums(batch, terms) | {"loss_denominator": lesson.denominator(terms)}

        return result_of(*draft(batch.inputs, head, memory.shard_logits, objective))

    def drafter(self, draft, head, device):
        return Session(self.taps, draft, head)

    def to_files(self, draft_state, layout):
        config = {"architectures": ["ParallelHeads"], "tap": self.taps[0], **vars(self.geometry)}
        return DraftFiles(config=config, tensors=dict(draft_state), notes=("no serving engine reads this",))

    def serve(self, files, head, taps_TNH, next_tokens_T, drafted_L):
        tap, token = taps_TNH[-1, 0].double(), head.embedding_VH[next_tokens_T[-1]].double()
        maps = [files.tensors[f"maps.{k}.weight"].double() for k in range(len(drafted_L))]
        outputs = torch.stack([tap + weight @ torch.cat((tap, token)) for weight in maps])
        normed = outputs * (outputs.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * files.tensors["norm_weight"]
        return (normed @ head.head_VH.double().T).softmax(-1)


@dataclass(frozen=True)
class Session:  # and the drafter: nothing is remembered between rounds
    taps: tuple[int, ...]
    draft: HeadsDraft
    head: object

    def open(self, batch_size):
        return self

    def keep(self, rows):
        pass

    @torch.inference_mode()
    def propose(self, taps, next_tokens, length, *, temperature=0.0, generator=None):
        tap_BH, token_B = (torch.stack([each[-1] for each in x]) for x in ([tap[:, 0] for tap in taps], next_tokens))
        outputs = self.draft.outputs(tap_BH, token_B, self.head.embedding_VH)[:length]
        weight_H = self.draft.norm_weight
        normed_BLH = nn.functional.rms_norm(torch.stack(outputs, 1), weight_H.shape, weight_H, 1e-6)
        logits_BLV = (normed_BLH @ self.head.head_VH.to(normed_BLH.dtype).T).float()
        index_BL, probs_BLV = pick(logits_BLV, temperature, generator)
        return Proposal(tokens_BL=index_BL, probs_BLV=probs_BLV)


def create(options, target):
    geometry = Geometry(steps=options.steps, hidden_size=target.hidden_size, vocab_size=target.vocab_size)
    return Heads(options=options, target=target, geometry=geometry, taps=(target.num_layers - 2,))


def from_files(files, target):
    made = create(HeadsOptions(steps=files.config["steps"]), target)
    load_stored(draft := HeadsDraft(made.geometry), files.tensors)  # CheckpointError unless they fit
    return made, draft


SPEC = AlgorithmSpec(
    name="heads", options=HeadsOptions, create=create, from_files=from_files,
    reads=lambda config: config.get("architectures") == ["ParallelHeads"],
)  # fmt: skip
