"""The pruned vocabulary against sorting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.data.vocabulary import build_vocabulary, coverage
from torchspec.core.errors import ConfigError, DataError


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=30), more=st.integers(0, 5), data=st.data())
def test_most_used_first_ties_and_gaps_by_id(counts: list[int], more: int, data: st.DataObject) -> None:
    target_size = len(counts) + more
    size = data.draw(st.integers(1, target_size))
    vocabulary = build_vocabulary(torch.tensor(counts), size, target_size)
    used = sorted((-count, token) for token, count in enumerate(counts) if count)
    chosen = [token for _, token in used][:size]
    chosen += [token for token in range(target_size) if token not in chosen][: size - len(chosen)]
    assert vocabulary.ids_N.tolist() == sorted(chosen)
    assert vocabulary.ids_N.dtype == torch.int64
    assert vocabulary.target_size == target_size
    # d2t holds offsets: target id = i + d2t[i]
    assert [i + offset for i, offset in enumerate(vocabulary.d2t_N.tolist())] == sorted(chosen)
    total = sum(counts)
    kept = sum(counts[token] for token in chosen if token < len(counts))
    assert coverage(torch.tensor(counts), vocabulary) == (kept / total if total else 1.0)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_size_that_does_not_fit_is_a_configuration_error(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"draft.vocab_size: must be from 1 to .* of 10 \(got {size}\)"):
        build_vocabulary(torch.ones(10, dtype=torch.int64), size, 10)


def test_counts_of_another_tokenizer() -> None:
    counts = torch.zeros(12, dtype=torch.int64)
    counts[3] = 1
    assert build_vocabulary(counts, 2, 10).ids_N.tolist() == [0, 3]
    counts[11] = 1
    with pytest.raises(DataError, match=r"token ids up to 11, the target's vocabulary ends at 9"):
        build_vocabulary(counts, 2, 10)
