"""What the runner tells the plug-in, which SGLang loads in processes of its own: one environment variable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torchspec.core import settings

_CAPTURE = "torchspec-capture"


@dataclass(frozen=True, kw_only=True)
class Orders:
    """`store`: directory of the feature store, of at most `store_bytes`; None: capture nothing.

    `taps`        in the order of the records
    `cpu_chains`  teach SGLang to decode with a draft on a CPU without AMX
    """

    store: str | None
    store_bytes: int
    taps: tuple[int, ...]
    cpu_chains: bool

    def give(self, environment: Mapping[str, str]) -> None:
        """To every process that this one starts from now on, with what else SGLang wants in its environment,
        where the user has not decided that."""
        settings.set_defaults(environment)
        settings.give_orders(json.dumps(asdict(self)))


def orders() -> Orders | None:
    """None where no runner started this process."""
    text = settings.orders()
    if text is None:
        return None
    fields = json.loads(text)
    return Orders(**fields | {"taps": tuple(fields["taps"])})


def request_id(record_id: str, number: int) -> str:
    """For SGLang: no two requests have the same one, even for the same record."""
    return f"{_CAPTURE}/{number}/{record_id}"


def record_of(rid: str) -> str | None:
    """None when the request is none of a capture."""
    kind, _, rest = rid.partition("/")
    return rest.partition("/")[2] if kind == _CAPTURE else None
