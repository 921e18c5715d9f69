"""What a directory seems to be that no algorithm here reads: a name says more to people than an unknown class."""

from __future__ import annotations

import re

from torchspec.core.interfaces.algorithm import DraftFiles

_MEDUSA = re.compile(r"^(medusa_heads?\.)?\d+\.\d+\.linear\.(weight|bias)$|^(parallel_draft_heads|medusa)")
_BY_CLASS = {
    "medusa": "Medusa heads: tokens are guessed from the last hidden state by heads of their own",
    "hydra": "Hydra heads, Medusa's that see the tokens before",
    "mlpspeculator": "an MLP speculator",
    "dflash2": "a DFlash-2 draft, which adds convolutions and a selector to DFlash",
    "eagledeepseekmtp": "a prediction head of DeepSeek's own",
}


def what_it_seems(files: DraftFiles) -> str:
    """For a message: "..., which no algorithm here reads"."""
    config, names = files.config, files.tensors.keys()
    stated = (
        config.get("speculators_model_type") or config.get("architectures") or config.get("model_type") or "nothing"
    )
    said = "".join(stated) if isinstance(stated, list) else str(stated)
    flat = said.lower().replace("_", "")
    for key, what in _BY_CLASS.items():
        if key in flat:
            return f"{stated} ({what})"
    if "medusa_num_heads" in config or any(_MEDUSA.search(name) for name in names):
        return f"{stated} ({_BY_CLASS['medusa']})"
    if "fc.weight" in names and any(name.startswith("layers.0.self_attn") for name in names):
        return f"{stated} (an EAGLE, EAGLE-2 or HASS draft: it reads one hidden state, and no taps)"
    if any(re.search(r"(^|\.)layers\.1\.", name) for name in names) and any("embed_tokens" in name for name in names):
        return f"{stated} (a language model of its own, which reads no features of a target)"
    return str(stated)
