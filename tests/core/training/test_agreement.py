"""What three ranks tell each other."""

from __future__ import annotations

import json
from pathlib import Path


def test_ranks_agree(runs: dict[int, Path]) -> None:
    found = json.loads((runs[3] / "agreement.json").read_text())["ranks"]
    for rank, answers in enumerate(found):
        assert answers["sum"] == [3, 3]
        assert answers["max"] == [2, 0]
        assert answers["broadcast"] == {"who": 0, "text": "ü"}
        assert answers["gather"] == ["", "x", "xx"]
        assert answers["main_only"] == (False if rank == 0 else None)  # what the wait gave, after many heartbeats
        assert answers["main_first"] == rank
        own = "TorchspecError: no luck"
        assert answers["failure_last"] == (own if rank == 2 else f"PeerError: rank 2 failed: {own}")
        assert answers["failure_main"] == (own if rank == 0 else f"PeerError: rank 0 failed: {own}")


def test_only_a_rank_that_is_gone_exceeds_the_deadline(runs: dict[int, Path]) -> None:
    found = json.loads((runs[3] / "patience.json").read_text())["ranks"]
    assert [answers["agree"] for answers in found] == [0, 1, 2]
    assert ["lost" in answers for answers in found] == [True, True, False]
    for answers in found[:2]:
        assert answers["lost"].startswith("PeerError: another rank is gone or no longer answers")
