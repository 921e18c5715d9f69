"""How families of targets store a multi-token-prediction head, and in what their heads differ.

All of them compute  x = proj([norm_e(embed(token)) ; norm_h(h)]) -> decoder layer -> final norm -> the target's head.
They differ in the names, in which half of proj reads the embedding, in whether the target's final norm has been applied
to the first h, in whether the next step reads the layer's output before or after the head's final norm, and in whether
the embedding at a text's first position is hidden. As vLLM computes them (`vllm/model_executor/models/`):

| family | proj reads | first h | later h | first embedding | seen in |
|---|---|---|---|---|---|
| mimo | [h ; e] | before the final norm | after the head's norm | zero | `mimo_mtp.py`, `mimo.py` |
| deepseek | [e ; h] | after the final norm | before the head's norm | zero | `deepseek_mtp.py`, `glm4_moe_mtp.py` |
| qwen | [e ; h] | after the final norm | after the head's norm | kept | `qwen3_next_mtp.py`, `qwen3_5_mtp.py` |

The decoder layers of DeepSeek's and Qwen's own models (latent or gated attention, experts) are other than those trained
here: what is meant is a head in their form around a dense layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torchspec.core.interfaces.features import NormState


@dataclass(frozen=True, kw_only=True)
class Family:
    """`prefix` and `next_head` stand before all names of the first head and of a second one; {n} is the number of the
    target's layers, {m} one more. `names` gives the stored module of ours, "layer" the decoder layer's prefix.

    embedding_first   proj reads [e ; h], not [h ; e]
    state             the target's hidden state that step 0 reads
    feeds_normed      later steps read the output after the head's own final norm
    hides_first       the embedding that position 0 of a text reads is zero
    copies            stored modules that repeat the target's embedding or head
    """

    name: str
    prefix: str
    next_head: str
    names: Mapping[str, str]
    embedding_first: bool
    state: NormState
    feeds_normed: bool
    hides_first: bool
    copies: Mapping[str, str] = field(default_factory=dict)

    def stored(self, name: str, num_layers: int) -> str:
        """The stored name of our parameter `name`."""
        module, _, rest = name.partition(".")
        inner = self.names[module]
        return self.prefix.format(n=num_layers) + (f"{inner}.{rest}" if inner else rest)

    def head_names(self, stored: Iterable[str], num_layers: int) -> list[str]:
        """Those of the `stored` names that belong to the head."""
        prefix = self.prefix.format(n=num_layers)
        return sorted(name for name in stored if name.startswith(prefix))

    def has_more(self, stored: Iterable[str], num_layers: int) -> bool:
        """Whether there is a second head."""
        prefix = self.next_head.format(n=num_layers, m=num_layers + 1)
        return any(name.startswith(prefix) for name in stored)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="mimo",
            prefix="model.mtp_layers.0.",
            next_head="model.mtp_layers.1.",
            names={
                "token_norm": "token_layernorm",
                "hidden_norm": "hidden_layernorm",
                "input_proj": "input_proj",
                "layer": "",
                "norm": "final_layernorm",
            },
            embedding_first=False,
            state="pre_norm",
            feeds_normed=True,
            hides_first=True,
        ),
        Family(
            name="deepseek",
            prefix="model.layers.{n}.",
            next_head="model.layers.{m}.",
            names={
                "token_norm": "enorm",
                "hidden_norm": "hnorm",
                "input_proj": "eh_proj",
                "layer": "",
                "norm": "shared_head.norm",
            },
            embedding_first=True,
            state="post_norm",
            feeds_normed=False,
            hides_first=True,
            copies={"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"},
        ),
        Family(
            name="qwen",
            prefix="mtp.",
            next_head="mtp.layers.1.",
            names={
                "token_norm": "pre_fc_norm_embedding",
                "hidden_norm": "pre_fc_norm_hidden",
                "input_proj": "fc",
                "layer": "layers.0",
                "norm": "norm",
            },
            embedding_first=True,
            state="post_norm",
            feeds_normed=True,
            hides_first=False,
        ),
    )
}


def family_of(stored: Iterable[str], num_layers: int) -> Family | None:
    """The family that a checkpoint's names show; None where it holds no head."""
    names = set(stored)
    found = (f for f in FAMILIES.values() if f.stored("input_proj.weight", num_layers) in names)
    return next(found, None)
