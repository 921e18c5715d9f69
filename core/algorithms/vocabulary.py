"""A draft's own vocabulary, in the buffers of the published formats.

Shape letters: N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from torchspec.core.interfaces.target import VocabularyMap


class VocabularyModule(nn.Module):
    """`d2t` [N] and `t2d` [V] of `VocabularyMap`, moved and stored with the module. To be derived from."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, vocabulary: VocabularyMap) -> None:
        super().__init__()
        self.register_buffer("d2t", vocabulary.d2t_N)
        self.register_buffer("t2d", vocabulary.t2d_V)
        self._map: tuple[Tensor, int, VocabularyMap] | None = None

    @property
    def vocabulary(self) -> VocabularyMap:
        """The map that `d2t` says, made anew only when the buffer changed: its host copy is kept between steps."""
        if self._map is None or self._map[0] is not self.d2t or self._map[1] != self.d2t._version:
            vocabulary = VocabularyMap.from_offsets(self.d2t, self.t2d.numel())
            self._map = (self.d2t, self.d2t._version, vocabulary)
        return self._map[2]


def vocabulary_of(draft: nn.Module) -> VocabularyMap:
    """Of a draft that may be wrapped or sharded."""
    assert isinstance(draft, VocabularyModule)
    return draft.vocabulary
