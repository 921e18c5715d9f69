"""A package that is not there: what SGLang imports of it exists, and says so when it is used.

These folders lie at the end of the search path, so an installed package always goes first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn


class _NamesItself(type):
    """Members of enumerations are looked up when SGLang is imported: each is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class AbsentClass(metaclass=_NamesItself):
    """May be derived from and made, since SGLang does so when it is imported."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __class_getitem__(cls, _: object) -> type:
        return cls


class AbsentModule(ModuleType):
    """Every name is in it: a class where it is written like one, else another such module, which nobody may call."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        found = type(name, (AbsentClass,), {}) if name[0].isupper() else sys.modules.get(full) or AbsentModule(full)
        setattr(self, name, found)
        return found

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{self.__name__.partition('.')[0]} is not installed here, and SGLang needs {self.__name__}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self.prefix = package + "."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self.prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(name: str) -> None:
    """Called by a package or module of this folder about itself: it gets every name that it doesn't define."""
    sys.modules[name].__class__ = AbsentModule
    if "." not in name:
        sys.meta_path.append(_Submodules(name))  # after the finder of files, so that real submodules go first
