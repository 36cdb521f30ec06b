"""Lets ``diffusers.DiffusionPipeline.from_pretrained`` find our pipeline once shapeloom is imported.

diffusers looks a pipeline's class up by name in its own namespace. So that namespace is taught the one name, whether
diffusers was imported before shapeloom or comes later, and neither diffusers nor torch is imported for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def teach(library: str, name: str, get: Callable[[], Any]) -> None:
    """Make ``getattr(library, name)`` call `get` (once), now or as soon as `library` is imported."""
    if library in sys.modules:
        _add_lazy_name(sys.modules[library], name, get)
    else:
        sys.meta_path.insert(0, _AfterImport(library, lambda module: _add_lazy_name(module, name, get)))


def _add_lazy_name(module: ModuleType, name: str, get: Callable[[], Any]) -> None:
    """A module's ``__getattr__`` may come from its class (as for diffusers' lazy modules), so that is extended."""
    kind = type(module)

    def __getattr__(self: ModuleType, wanted: str) -> Any:
        if wanted == name:
            value = get()
            setattr(self, name, value)
            return value
        fallback = getattr(kind, "__getattr__", None)
        if fallback is None:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{wanted}'")
        return fallback(self, wanted)

    module.__class__ = type(kind.__name__, (kind,), {"__getattr__": __getattr__, "__module__": kind.__module__})


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `act` on a module when it has been imported, then is gone."""

    def __init__(self, library: str, act: Callable[[ModuleType], None]) -> None:
        self.library, self.act = library, act
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.library or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:  # only looking for a module, as is_available() does, must not end the wait
                    sys.meta_path.remove(self)
                self.act(sys.modules[fullname])  # diffusers puts another object there while it is imported

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
