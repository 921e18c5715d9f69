"""A resolved configuration as YAML that says where every value came from, and reads back as the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from torchspec.core.config import sources
from torchspec.core.config.schema import RunConfig


class _Dumper(yaml.SafeDumper):
    """Quotes text that either kind of YAML, 1.1 or 1.2, would take for something else."""


sources.add_scalars(_Dumper)


def to_yaml(config: RunConfig, provenance: Mapping[str, str]) -> str:
    """YAML text with a comment on every setting: `lr: 0.001  # run.yaml:12`."""
    lines: list[str] = []
    _lines(config.model_dump(mode="json"), provenance, "", lines)
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, Any], provenance: Mapping[str, str], prefix: str, lines: list[str]) -> None:
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        path = prefix + key
        if isinstance(value, dict) and path not in provenance:
            lines.append(f"{indent}{key}:")
            _lines(value, provenance, f"{path}.", lines)
            continue
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**16, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...")
        source = provenance.get(path)
        lines.append(f"{indent}{key}: {text}" + (f"  # {source}" if source else ""))
