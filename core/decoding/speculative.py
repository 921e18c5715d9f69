"""Chain speculative decoding of a batch, through the interfaces of the target engine and of the draft.

A round: the draft proposes L tokens after the newest known one, the target runs once over that one and the L,
verification keeps the leading tokens the target agrees with and adds one of the target's own.

Shape letters: B sequences still running, L drafted tokens, n = L + 1 tokens fed, V vocabulary, N taps, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchspec.core.decoding.generation import Decoded, DecodeSettings, Round, Row, Stopwatch, opened, start_rows
from torchspec.core.decoding.sampling import Verdict, choose, verify
from torchspec.core.interfaces.algorithm import Drafter, Proposal
from torchspec.core.interfaces.engine import Images, StepOutput, TargetEngine


@torch.no_grad()
def decode(
    engine: TargetEngine,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    *,
    seed: int = 0,
    images: Sequence[Images] = (),
) -> Decoded:
    """Generate after every prompt; sequences that end leave the batch at once.

    At temperature 0 the text is token for token what greedy decoding gives (as far as the target's logits do not
    depend on how many tokens are fed at once); above it the text is distributed as the target's own.
    `seed` matters at temperature > 0; verification and the drafter draw from the same generator.
    Every round drafts `draft_length` tokens however few are still wanted, as serving engines do, except where the
    fullest sequence of the batch has less room in the target's context. `images`: see `TargetEngine.open`.
    Raises DataError for a prompt without room for a new token.
    """
    rows = start_rows(prompts, engine.describe(), settings)
    watch = Stopwatch()
    with watch("prefill"):
        session = opened(engine, prompts, drafter.taps, images)
        watch.device = session.prefill.logits_BV.device
    generator = torch.Generator(watch.device).manual_seed(seed)
    with watch("draft"):
        draft = drafter.open(len(prompts))
    pending_B = choose(session.prefill.logits_BV, settings.temperature, generator)
    taps: list[Tensor] = session.prefill.taps
    next_tokens = [
        torch.cat((torch.tensor(prompt[1:], dtype=torch.int64, device=pending_B.device), pending_B[place, None]))
        for place, prompt in enumerate(prompts)
    ]
    for row, token in zip(rows, pending_B.tolist(), strict=True):
        row.extend([token])
    alive = list(rows)
    while True:
        keep = [place for place, row in enumerate(alive) if row.finish is None]
        if not keep:
            break
        if len(keep) < len(alive):
            with watch("target"):
                session.keep(keep)
            with watch("draft"):
                draft.keep(keep)
            pending_B = pending_B[keep]
            taps, next_tokens = [taps[place] for place in keep], [next_tokens[place] for place in keep]
            alive = [alive[place] for place in keep]
        length = min(settings.draft_length, *(row.room for row in alive))
        with watch("draft"):
            proposal = draft.propose(taps, next_tokens, length, temperature=settings.temperature, generator=generator)
        _check(proposal, len(alive), length)
        proposal = _shortened(proposal)
        with watch("target"):
            output = session.step(torch.cat((pending_B[:, None], proposal.tokens_BL), dim=1))
        verdict = verify(output.logits_BnV, proposal, settings.temperature, generator)
        with watch("target"):
            session.rollback(proposal.tokens_BL.shape[1] - verdict.accepted_B)
        pending_B = verdict.next_B
        taps, next_tokens = _confirm(alive, proposal, output, verdict)
    return Decoded(
        generations=[row.generation() for row in rows],
        seconds=watch.seconds(),
        device=watch.device,
        dtype=session.prefill.taps[0].dtype,
    )


def _check(proposal: Proposal, rows: int, length: int) -> None:
    """A drafter is a plug-in: hold it to its contract before its tokens reach the target."""
    shape = tuple(proposal.tokens_BL.shape)
    if len(shape) != 2 or shape[0] != rows or shape[1] > length:
        raise ValueError(f"the drafter proposed tokens of shape {shape}; expected [{rows}, at most {length}]")


def _shortened(proposal: Proposal) -> Proposal:
    """Without columns that are padding in every row: the target is not asked about them."""
    if proposal.lengths_B is None:
        return proposal
    longest = int(proposal.lengths_B.max())
    probs_BLV = None if proposal.probs_BLV is None else proposal.probs_BLV[:, :longest]
    return replace(proposal, tokens_BL=proposal.tokens_BL[:, :longest], probs_BLV=probs_BLV)


def _confirm(
    alive: Sequence[Row], proposal: Proposal, output: StepOutput, verdict: Verdict
) -> tuple[list[Tensor], list[Tensor]]:
    """Record the round in every row; -> what the target just confirmed, for the draft: taps and the tokens after."""
    accepted = verdict.accepted_B.tolist()
    proposed = [proposal.tokens_BL.shape[1]] * len(alive) if proposal.lengths_B is None else proposal.lengths_B.tolist()
    # Row b's new tokens are the first accepted[b] + 1 of confirmed_Bn[b].
    confirmed_Bn = torch.cat((proposal.tokens_BL, verdict.next_B[:, None]), dim=1)
    confirmed_Bn.scatter_(1, verdict.accepted_B[:, None], verdict.next_B[:, None])
    taps, next_tokens = [], []
    for place, (row, tokens) in enumerate(zip(alive, confirmed_Bn.tolist(), strict=True)):
        count = accepted[place] + 1
        slot = row.length - 2
        emitted = row.extend(tokens[:count])
        row.rounds.append(Round(slot=slot, proposed=proposed[place], accepted=count - 1, emitted=emitted))
        taps.append(output.taps_BnNH[place, :count])
        next_tokens.append(confirmed_Bn[place, :count])
    return taps, next_tokens
