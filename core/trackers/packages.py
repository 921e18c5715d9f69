"""Whether a tracker's package is there."""

from __future__ import annotations

import importlib.util

from torchspec.core.interfaces.device import Availability

PROJECT = "torchspec"
"""What runs are filed under where nobody says it."""


def installed(package: str) -> Availability:
    """Found, without being imported; the extra that brings it has its name."""
    if importlib.util.find_spec(package) is not None:
        return Availability(ok=True)
    return Availability(
        ok=False, reason=f"the package {package} is not installed", hint=f'pip install "torchspec[{package}]"'
    )
