"""Text from the target: greedy or sampled, a batch at a time.

Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchspec.backends.api import Images
from torchspec.backends.hf.session import HfDecodeSession
from torchspec.backends.hf.target import HfTarget


def generate(
    target: HfTarget,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    images: Sequence[Images] = (),
) -> list[list[int]]:
    """New tokens of each prompt up to and including the first end-of-turn token.

    Greedy at temperature 0. Otherwise a prompt's randomness comes from `seed` and its own tokens alone, so that
    it gives the same text in any batch, unless rounding in a batch of another shape tips a draw over.
    All prompts are decoded together, but for those with images; architectures that cannot share a cache run one by one.
    Raises DataError for images that are not those that were tokenised.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    shown = list(images) or [()] * len(prompts)
    together = [] if target.rollback != "full" else [place for place, each in enumerate(shown) if not each]
    groups = [together] if together else []
    groups += [[place] for place in range(len(prompts)) if place not in together]
    texts: dict[int, list[int]] = {}
    for group in groups:
        some, of_them = [prompts[place] for place in group], [shown[place] for place in group]
        texts |= zip(group, _generate_batch(target, some, of_them, max_new_tokens, temperature, seed), strict=True)
    return [texts[place] for place in range(len(prompts))]


def _generate_batch(
    target: HfTarget,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Images],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    session = HfDecodeSession(target, prompts, (), images=images, recording=False)
    draws = [prompt_generator(seed, prompt) for prompt in prompts] if temperature > 0 else []
    stop = set(target.spec.eos_token_ids)
    new: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    logits_BV = session.prefill.logits_BV
    while True:
        if temperature > 0:
            uniform_B = torch.cat([torch.rand(1, generator=draws[prompt]) for prompt in running])
            token_B = sample(logits_BV, temperature, uniform_B.to(logits_BV.device))
        else:
            token_B = logits_BV.argmax(-1)
        going = []
        for row, (prompt, token) in enumerate(zip(running, token_B.tolist(), strict=True)):
            new[prompt].append(token)
            if token not in stop and len(new[prompt]) < max_new_tokens:
                going.append(row)
        if not going:
            return new
        if len(going) < len(running):
            session.keep(going)
            token_B = token_B[going]
            running = [running[row] for row in going]
        logits_BV = session.step(token_B[:, None]).logits_BnV[:, 0]


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> Tensor:
    """Inverse transform sampling [B]: the first token whose cumulative probability exceeds uniform[b] in [0, 1).

    One number per token, whatever the vocabulary's size. A token of probability 0 is never chosen: the sum does not
    grow there. Where rounding leaves no token above the threshold, the likeliest is taken.
    """
    wide_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    cumulative_BV = torch.softmax(wide_BV / temperature, dim=-1).cumsum(-1)
    threshold_B1 = uniform_B[:, None].to(cumulative_BV.dtype) * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    return torch.where(token_B < logits_BV.shape[1], token_B, logits_BV.argmax(-1))


def prompt_generator(seed: int, prompt: Sequence[int]) -> torch.Generator:
    """A CPU generator of this seed and this prompt: other prompts draw independently."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
