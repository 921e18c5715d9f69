"""Training windows of a DSpark draft whose sequences ranks share:
`sharing_worker.py cells.json results/ ranks port`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PLACE = Path(__file__).parents[1] / "block_sharing.py"

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(PLACE.stem, PLACE)
    assert spec is not None
    assert spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    sys.exit(shared.run("dspark", {"markov_rank": 4}, ("_head.",)))
