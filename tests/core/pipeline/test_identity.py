"""What a checkpoint says it belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.errors import CheckpointError
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.pipeline.identity import draft_facts
from torchspec.core.training.checkpoint import refuse_other_run


def test_a_draft_config_named_by_its_directory_is_carried(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    """A checkpoint stands alone: it holds the text of the file, and knows it by its contents."""
    text = '{"intermediate_size": 80}'
    (tmp_path / "config.json").write_text(text)
    target = read_target_spec(tiny_target)
    algorithm = Eagle3.create(Eagle3Options(config=tmp_path), target)
    config, _ = make_config(tmp_path / "run", f"draft.config={tmp_path}")
    facts = draft_facts(config, algorithm, target, VocabularyMap.identity(300), {"files": []})
    assert facts["option_files"] == {"config": text}
    assert facts["identity"]["draft"]["config"] == hashlib.sha256(text.encode()).hexdigest()


def test_what_changed_in_the_data_is_named(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    """And a checkpoint without the ingredients of its data is compared by their fingerprint."""
    config, _ = make_config(tmp_path / "run")
    target, tokenizer = read_target_spec(tiny_target), load_tokenizer(tiny_target)
    algorithm = Eagle3.create(Eagle3Options(), target)

    def facts(text: str, name: str, max_length: int) -> dict[str, Any]:
        (tmp_path / name).write_text(text)
        found = cache.ingredients([tmp_path / name], tokenizer, DatasetSettings(max_length=max_length), None)
        made = draft_facts(config, algorithm, target, VocabularyMap.identity(300), found)
        return dict(json.loads(json.dumps(made)))

    saved = facts("old", "a.jsonl", 64)
    refuse_other_run(tmp_path, saved, facts("old", "a.jsonl", 64))
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in ("old", "new")]
    with pytest.raises(CheckpointError) as caught:
        refuse_other_run(tmp_path, saved, facts("new", "a.jsonl", 65))
    assert [line for line in str(caught.value).splitlines() if line.startswith("  - ")] == [
        f"  - data.contents.1 (a.jsonl): the checkpoint has {digests[0]!r}, this run {digests[1]!r}",
        "  - data.settings.max_length: the checkpoint has 64, this run 65",
    ]
    with pytest.raises(CheckpointError, match=r"data\.files: the checkpoint has \['a.jsonl'\], this run \['b.jsonl'\]"):
        refuse_other_run(tmp_path, saved, facts("old", "b.jsonl", 64))
    del saved["data"]
    refuse_other_run(tmp_path, saved, facts("old", "a.jsonl", 64))
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: the checkpoint has "):
        refuse_other_run(tmp_path, saved, facts("new", "a.jsonl", 64))
