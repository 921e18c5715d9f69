"""What a process needs to join a Mooncake store, and whether there is one."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from torchspec.core.errors import StoreLostError

_LEAST_SEGMENT = 16 << 20


@dataclass(frozen=True, kw_only=True)
class MooncakeSettings:
    """JSON. What a process needs to join the store.

    master         HOST:PORT of `mooncake_master`
    metadata       "P2PHANDSHAKE": processes ask each other; or the URL of a metadata server that somebody runs
    rdma_devices   comma-separated; "" finds them
    hostname       the address under which other machines reach this one
    segment_bytes  memory for records that this process offers; 0 for one that only reads
    buffer_bytes   registered memory that is kept for further reads and writes while it is not in use
    timeout        seconds that one question to the master, or a transfer that stands still, may take

    The first store of a process sets Mooncake's timeouts for all of them.
    """

    master: str
    metadata: str = "P2PHANDSHAKE"
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = ""
    hostname: str = "127.0.0.1"
    segment_bytes: int = 0
    buffer_bytes: int = 256 << 20
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if 0 < self.segment_bytes < _LEAST_SEGMENT:
            raise ValueError(f"a segment of Mooncake has {_LEAST_SEGMENT} bytes at least, got {self.segment_bytes}")


def probe(config: MooncakeSettings) -> None:
    """StoreLostError when no master answers; ValueError for an address that is none."""
    host, _, port = config.master.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=config.timeout).close()
    except OSError as error:
        raise StoreLostError(
            f"no Mooncake master answers at {config.master} ({error}): start one, or correct its address"
        ) from error
    except ValueError:
        raise ValueError(f"the address of a Mooncake master is HOST:PORT, got {config.master!r}") from None
