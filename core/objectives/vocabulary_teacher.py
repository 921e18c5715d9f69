"""Teaching where ranks share the target's head and no logits travel: each rank has those of all ranks' rows and pairs
over its own part of the vocabulary.

Of a chunk the target's hidden states and the draft's normed outputs of all ranks are gathered; every rank multiplies
both by its part of the two heads. Then one exchange of maxima, sums of exponentials and first choices, one sum of what
the terms add up over the vocabulary, and one all-to-all that takes the gradients of the outputs home.

Shape letters: P ranks, R target rows of this rank, A rows and M pairs of all ranks' chunks, C pairs of this rank's,
H hidden size, V target vocabulary, N this rank's part of the draft vocabulary, S = 3 statistics, D kinds of them: of
the draft's tokens and, if those are not all, of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import Chunk, SharedChunk
from torchspec.core.objectives.reading import HeadReader
from torchspec.core.objectives.statistics import log_normaliser, merged, statistics
from torchspec.core.objectives.teacher import Coverage, covered
from torchspec.core.objectives.vocabulary_terms import Part
from torchspec.core.objectives.weighting import weigh
from torchspec.core.ops.distillation import TileTeacher
from torchspec.core.ops.maps import OutputHead, add_product
from torchspec.core.ops.slices import row_slices
from torchspec.core.parallel.vocabulary import gather_rows, gather_vectors, summed, to_owners


@dataclass(frozen=True, kw_only=True)
class OwnPairs:
    """This rank's pairs of a chunk: normed outputs, what is added to their logits, target rows among the chunk's own,
    weights before coverage, and the draft indices of the tokens that came (OUTSIDE without)."""

    normed_CH: Tensor
    extra_CX: Tensor | None
    row_C: Tensor
    base_C: Tensor
    truth_C: Tensor


@dataclass(frozen=True, kw_only=True)
class OwnHeads:
    """The products of the rows `VocabularyTeacher.columns` of the draft's head; those rows of the map of what is added
    to its logits, and the same for `FusedOps.wide_mm`; and where the gradients of all ranks' pairs are added, if they
    are wanted."""

    products: OutputHead
    dhead_NH: Tensor | None
    extra_NX: Tensor | None
    wide_XN: Tensor | None
    dextra_NX: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Taught:
    """Of this rank's pairs: terms by name (with cross_entropy and alpha), first choices' agreement, and gradients."""

    value: Mapping[str, Tensor]
    entropy_C: Tensor
    coverage_C: Tensor
    agree_C: Tensor
    dnormed_CH: Tensor | None
    dextra_CX: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The target at all ranks' rows: `teacher` over this part, the rest over all V."""

    teacher: TileTeacher
    best_A: Tensor
    first_choice_A: Tensor
    coverage_A: Tensor
    partial_A: Tensor
    log_mass_A: Tensor


class VocabularyTeacher:
    """Reads this rank's part of the target's head over the hidden states of all ranks, `normed_RH` being this one's.

    Its methods are collectives and take chunks of `plan_shared_chunks`. `with_logs` as for `Teacher`.
    """

    def __init__(
        self,
        head: TargetHead,
        normed_RH: Tensor,
        vocabulary: VocabularyMap,
        ops: FusedOps,
        *,
        coverage: Coverage = "drop",
        with_logs: bool = False,
    ) -> None:
        assert head.shards is not None
        self._shards, self._ops = head.shards, ops
        self._reader = HeadReader(head, vocabulary, ops)
        self._normed_RH = normed_RH.to(self._reader.dtype)
        self._coverage, self._with_logs = coverage, with_logs
        self._whole: list[Tensor] = []
        self._rows_NH: Tensor | None = None
        self.wide = self._reader.wide
        self.columns = self._reader.columns

    @torch.no_grad()
    def survey(self, chunks: Sequence[Chunk]) -> Tensor:
        """As `Teacher.survey`, of this rank's rows."""
        if not chunks or not self._reader.pruned or self._coverage == "renormalise":
            return torch.ones(self._normed_RH.shape[0], dtype=self.wide, device=self._normed_RH.device)
        rows_NH, coverage = self._reader.draft_rows(), []
        for chunk in chunks:
            assert isinstance(chunk, SharedChunk)
            _, own_DSA = self._read(chunk)
            rows_DSA = merged(gather_vectors(own_DSA.flatten(), self._shards).view(-1, *own_DSA.shape))
            self._whole.append(rows_DSA[1])
            coverage.append(self._choices(rows_DSA)[2][chunk.own_rows])
        self._rows_NH = rows_NH
        return torch.cat(coverage)

    @torch.no_grad()
    def teach(
        self,
        chunk: SharedChunk,
        pairs: OwnPairs,
        weights: Mapping[str, float | Tensor],
        heads: OwnHeads,
        *,
        with_grad: bool,
    ) -> Taught:
        """Terms and gradients of this rank's pairs; `weights` of the terms, of all pairs or of each of them."""
        logits_AN, rows_DSA = self._read(chunk)
        normed_MH = gather_rows(pairs.normed_CH, chunk.pairs_P, self._shards)
        z_MN = heads.products.logits(normed_MH)
        extra_MX = None
        if pairs.extra_CX is not None:
            assert heads.wide_XN is not None
            extra_MX = gather_rows(pairs.extra_CX, chunk.pairs_P, self._shards)
            add_mapped(z_MN, extra_MX, heads.wide_XN, self._ops)
        own_weights = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        facts = (pairs.base_C, pairs.row_C.to(self.wide), pairs.truth_C.to(self.wide), *own_weights.values())
        rows_DSA, draft_SM, facts_FM = self._exchange(chunk, rows_DSA, self._statistics(z_MN), torch.stack(facts))
        rows = self._rows(logits_AN, rows_DSA)
        top_M, mass_M, best_M = draft_SM
        row_M = facts_FM[1].long()
        weight_M = facts_FM[0] * rows.coverage_A[row_M]
        weights = {**weights, **dict(zip(own_weights, facts_FM[3:], strict=True))}
        soft, labels = weigh(weights, weight_M, rows.best_A[row_M], facts_FM[2].long())
        part = Part(
            z_MN=z_MN.sub_(top_M[:, None]),
            mass_M=mass_M,
            teacher=rows.teacher,
            row_M=row_M,
            weight=soft,
            labels=labels,
            first=self.columns.start,
            temporary_bytes=self._ops.temporary_bytes,
        )
        totals_SM, partial_A = self._totals(part.sums(), rows.partial_A)
        own, row_C = chunk.own_pairs, row_M[chunk.own_pairs]
        agree_C = (best_M.long() == rows.first_choice_A[row_M])[own]
        dnormed_CH = dextra_CX = None
        if with_grad:
            part.differentiate(totals_SM)
            dlogits_MN = heads.products.narrowed(z_MN, normed_MH)
            dnormed_CH = self._to_owners(chunk, heads.products.backward(dlogits_MN, normed_MH, heads.dhead_NH))
            if extra_MX is not None:
                assert heads.extra_NX is not None
                dlogits_MN = dlogits_MN.to(extra_MX.dtype)
                add_product(heads.dextra_NX, dlogits_MN, extra_MX, self._ops)
                dextra_CX = self._to_owners(chunk, dlogits_MN @ heads.extra_NX)
        return Taught(
            value={name: value_M[own] for name, value_M in part.values(totals_SM).items()},
            entropy_C=(rows.log_mass_A - partial_A)[row_C],
            coverage_C=rows.coverage_A[row_C],
            agree_C=agree_C,
            dnormed_CH=dnormed_CH,
            dextra_CX=dextra_CX,
        )

    def _read(self, chunk: SharedChunk) -> tuple[Tensor, Tensor]:
        """(logits [A, N] over this part of the draft vocabulary, statistics [D, S, A] of the part; D = 1 after a
        survey)."""
        reader = self._reader
        normed_AH = gather_rows(self._normed_RH[chunk.start : chunk.stop], chunk.rows_P, self._shards)
        if self._rows_NH is not None or not reader.pruned:
            rows_NH = reader.draft_rows() if self._rows_NH is None else self._rows_NH
            logits_AN = reader.head.finished(reader.products(normed_AH, rows_NH))
            return logits_AN, self._statistics(logits_AN)[None]
        reading = reader.read(normed_AH)
        logits_AN = reader.head.finished(reading.products_CN)
        return logits_AN, torch.stack((self._statistics(logits_AN), reading.whole_3C))

    def _statistics(self, logits_MN: Tensor) -> Tensor:
        parts = [statistics(logits_MN[part], self.columns.start) for part in self._reader.slices(logits_MN)]
        return torch.cat(parts, dim=1)

    def _exchange(
        self, chunk: SharedChunk, rows_DSA: Tensor, draft_SM: Tensor, facts_FC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows_DSA and draft_SM of the whole vocabulary, the facts [F, M] of all ranks' pairs); the second fact is the
        target row, which is counted among all ranks' afterwards."""
        most = max(chunk.pairs_P)
        packed = (rows_DSA, draft_SM, F.pad(facts_FC, (0, most - facts_FC.shape[1])))
        gathered = gather_vectors(torch.cat([each.flatten() for each in packed]), self._shards)
        rows, draft, facts_P = torch.split(gathered, [each.numel() for each in packed], dim=1)
        rows_DSA = merged(rows.reshape(-1, *rows_DSA.shape))
        if self._rows_NH is not None:
            rows_DSA = torch.stack((rows_DSA[0], self._whole[chunk.place]))
        real = []
        for rank, (found_FX, count) in enumerate(
            zip(facts_P.reshape(-1, len(facts_FC), most), chunk.pairs_P, strict=True)
        ):
            found_FC = found_FX[:, :count]
            found_FC[1] += sum(chunk.rows_P[:rank])
            real.append(found_FC)
        return rows_DSA, merged(draft.reshape(-1, *draft_SM.shape)), torch.cat(real, dim=1)

    def _choices(self, rows_DSA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mass inside the draft vocabulary, draft index of the first choice among all V, coverage), [A] each."""
        draft_SA, whole_SA = rows_DSA[0], rows_DSA[-1]
        if not self._reader.pruned:
            ones_A = torch.ones_like(draft_SA[0])
            return ones_A, draft_SA[2].long(), ones_A
        inside_A = (log_normaliser(draft_SA) - log_normaliser(whole_SA)).exp_().clamp_max_(1.0)
        first_choice_A = self._reader.draft_index(whole_SA[2])
        return inside_A, first_choice_A, covered(self._coverage, first_choice_A, inside_A)

    def _rows(self, logits_AN: Tensor, rows_DSA: Tensor) -> _Rows:
        inside_A, first_choice_A, coverage_A = self._choices(rows_DSA)
        top_A, mass_A, best_A = rows_DSA[0]
        log_mass_A = mass_A.log()
        # A token of logit -inf has probability 0 and adds nothing to the entropy.
        less_AN = logits_AN.sub_(top_A[:, None]).clamp_min_(torch.finfo(self.wide).min)
        probs_AN = less_AN.exp().div_(mass_A[:, None])
        partial_A = torch.linalg.vecdot(probs_AN, less_AN)
        return _Rows(
            teacher=TileTeacher(
                probs_RN=probs_AN,
                inside_R=inside_A if self._reader.pruned else None,
                log_probs_RN=less_AN.sub_(log_mass_A[:, None]) if self._with_logs else None,
            ),
            best_A=best_A.long(),
            first_choice_A=first_choice_A,
            coverage_A=coverage_A,
            partial_A=partial_A,
            log_mass_A=log_mass_A,
        )

    def _totals(self, sums_SM: Tensor, partial_A: Tensor) -> tuple[Tensor, Tensor]:
        packed = summed(torch.cat((sums_SM.flatten(), partial_A)), self._shards)
        return packed[: sums_SM.numel()].view_as(sums_SM), packed[sums_SM.numel() :]

    def _to_owners(self, chunk: SharedChunk, parts_MH: Tensor) -> Tensor:
        """Of this rank's pairs the sum of what all ranks' parts of the vocabulary give."""
        return to_owners(parts_MH, chunk.pairs_P, self._shards).to(self.wide).sum(0)


def add_mapped(logits_MN: Tensor, extra_MX: Tensor, wide_XN: Tensor, ops: FusedOps) -> None:
    """logits += extra E^T, in slices: a second tile of logits would double what the chunk holds."""
    row_bytes = logits_MN.shape[1] * logits_MN.element_size()
    for part in row_slices(0, len(logits_MN), row_bytes, ops.temporary_bytes):
        logits_MN[part] += ops.wide_mm(extra_MX[part], wide_XN)
