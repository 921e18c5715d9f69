"""What a checkpoint says it belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.pipeline.identity import draft_facts


def test_a_draft_config_named_by_its_directory_is_carried(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    """A checkpoint stands alone: it holds the text of the file, and knows it by its contents."""
    text = '{"intermediate_size": 80}'
    (tmp_path / "config.json").write_text(text)
    target = read_target_spec(tiny_target)
    algorithm = Eagle3.create(Eagle3Options(config=tmp_path), target)
    config, _ = make_config(tmp_path / "run", f"draft.config={tmp_path}")
    facts = draft_facts(config, algorithm, target, VocabularyMap.identity(300), "data")
    assert facts["option_files"] == {"config": text}
    assert facts["identity"]["draft"]["config"] == hashlib.sha256(text.encode()).hexdigest()
