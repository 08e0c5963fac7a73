"""Run a function once a module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module, now or right after its import; only the first registered function is called."""
    if name in sys.modules:
        function(sys.modules[name])
    elif not any(isinstance(finder, _ImportHook) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHook(name, function))


class _ImportHook(MetaPathFinder):
    """Meta path finder that wraps the loader of a module."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self._function, self._searching = name, function, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self._function(module)

            loader.exec_module = exec_module
        return spec
