"""Decoding without a draft: the baseline that speculation must equal in text and beat in speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchspec.core.decoding.generation import Decoded, DecodeSettings, Stopwatch, opened, start_rows
from torchspec.core.decoding.sampling import choose
from torchspec.core.interfaces.engine import Images, TargetEngine


@torch.no_grad()
def decode_plain(
    engine: TargetEngine,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    *,
    seed: int = 0,
    images: Sequence[Images] = (),
) -> Decoded:
    """One token per target step, through the same session interface as speculation.

    `seed` matters at temperature > 0; `images`: see `TargetEngine.open`. Raises DataError for a prompt without room
    for a new token.
    """
    rows = start_rows(prompts, engine.describe(), settings)
    watch = Stopwatch()
    with watch("prefill"):
        session = opened(engine, prompts, (), images)
        watch.device = session.prefill.logits_BV.device
    generator = torch.Generator(watch.device).manual_seed(seed)
    token_B = choose(session.prefill.logits_BV, settings.temperature, generator)
    alive = list(rows)
    while True:
        for row, token in zip(alive, token_B.tolist(), strict=True):
            row.extend([token])
        keep = [place for place, row in enumerate(alive) if row.finish is None]
        if not keep:
            break
        if len(keep) < len(alive):
            with watch("target"):
                session.keep(keep)
            token_B = token_B[keep]
            alive = [alive[place] for place in keep]
        with watch("target"):
            logits_BnV = session.step(token_B[:, None]).logits_BnV
        token_B = choose(logits_BnV[:, -1], settings.temperature, generator)
    return Decoded(
        generations=[row.generation() for row in rows],
        seconds=watch.seconds(),
        device=watch.device,
        dtype=session.prefill.taps[0].dtype,
    )
