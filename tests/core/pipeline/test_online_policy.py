"""A policy and its draft trained together by two ranks that share the policy's vocabulary, from what the guides say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

WORKER = Path(__file__).with_name("online_policy_worker.py")


def test_ranks_that_share_the_vocabulary_are_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    """Log-probabilities, entropies, gradients of the policy and the draft's losses, before and after its updates."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(WORKER), str(tiny_llama), str(tmp_path), str(store.port)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    alone, *ranks = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )  # fmt: skip
    assert len(alone) == 3
    for number, step in enumerate(alone):
        for rank in ranks:
            found = rank[number]
            assert found["loss"] == pytest.approx(step["loss"], rel=1e-5)
            assert found["log_probabilities"] == pytest.approx(step["log_probabilities"], rel=1e-4)
            assert found["norm"] == pytest.approx(step["norm"], rel=1e-4)
            assert found["draft"] == pytest.approx(step["draft"], rel=1e-4)
            assert found["stale"] == 0
    assert len({step["draft"] for step in alone}) == 3
