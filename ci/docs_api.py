"""An extension of griffe for the API reference: a dataclass shows its fields in its signature, not once more below."""

from __future__ import annotations

from typing import Any

import griffe


class FieldsInTheSignature(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """After griffe's own extension has made the signatures."""
        self._look(pkg)

    def _look(self, inside: griffe.Module | griffe.Class) -> None:
        for module in inside.modules.values():
            if not module.is_alias:
                self._look(module)
        for cls in inside.classes.values():
            if not cls.is_alias:
                self._look(cls)
        if "dataclass" in inside.labels:
            for name, member in list(inside.members.items()):
                if member.is_attribute and not member.has_docstring and "property" not in member.labels:
                    inside.del_member(name)
