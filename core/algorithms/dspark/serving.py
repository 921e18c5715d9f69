"""How serving engines read a DSpark draft, in plain float64 torch: the exporter's independent reader.

Rules followed (seen in SGLang `dspark.py` and vLLM `qwen3_dspark.py`): the Markov head adds its bias to the logits of
one step after the other, from the token drafted before it (the anchor first), as an id of the target; gate and state
read the slots' outputs after the final norm; the state is zero at the start of every block.

Shape letters: T context positions, K steps, L drafted tokens, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.serving import Reader, check_names
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.target import TargetHead

OF_HEAD = {
    "vanilla": (),
    "gated": ("gate_proj.weight", "gate_proj.bias"),
    "rnn": ("joint_proj.weight", "joint_proj.bias"),
}


def own_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the heads' tensors that engines load for this config."""
    names = ["markov_w1.weight", "markov_w2.weight", *OF_HEAD[config["markov_head_type"]]]
    confidence = ("confidence_head.proj.weight", "confidence_head.proj.bias")
    return (*(f"markov_head.{name}" for name in names), *(confidence if config["enable_confidence_head"] else ()))


class DSparkReader(Reader):
    def biased(self, states_KH: Tensor, anchor: Tensor, drafted_L: Tensor) -> Tensor:
        """Logits [L, N] of the drafted tokens, each given those before it."""
        first, second = (self.weight[f"markov_head.markov_w{number}"] for number in (1, 2))
        logits_KN, rows, state = self.logits(states_KH), [], first.new_zeros(first.shape[1])
        for step in range(len(drafted_L)):
            embedded = first[int(anchor if step == 0 else drafted_L[step - 1])]
            feature, state = self._feature(states_KH[step], embedded, state)
            rows.append(logits_KN[step] + second @ feature)
        return torch.stack(rows)

    def _feature(self, hidden: Tensor, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(what W2 is multiplied by, the next state)."""
        kind = self.files.config["markov_head_type"]
        if kind == "vanilla":
            return embedded, state
        if kind == "gated":
            return torch.sigmoid(self._map("gate_proj", hidden, embedded)) * embedded, state
        gate, candidate, output = self._map("joint_proj", state, embedded, hidden).chunk(3)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def _map(self, name: str, *read: Tensor) -> Tensor:
        return self.weight[f"markov_head.{name}"] @ torch.cat(read) + self.weight[f"markov_head.{name}.bias"]


def serve(files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor) -> Tensor:
    """Probabilities [L, V], float64, of each drafted token. See `Algorithm.serve`."""
    check_names(files, own_tensors(files.config))
    reader, anchor = DSparkReader(files, head), next_tokens_T[-1]
    return reader.probabilities(reader.biased(reader.states(taps_TNH, anchor), anchor, drafted_L))
