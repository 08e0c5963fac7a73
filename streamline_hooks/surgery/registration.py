"""Make Transformers know checkpoints with splices, as soon as its Auto classes are there and not before.

Importing the Auto classes takes a quarter of a second, more than all of this library. Whoever loads a checkpoint
imports them anyway; until then only a note waits for them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Let ``AutoConfig`` know the model type of checkpoints with splices, now or when it is imported."""
    if _AUTO in sys.modules:
        _register(sys.modules[_AUTO])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(auto: ModuleType) -> None:
    from streamline_hooks.surgery.spliced_model import MODEL_TYPE, StreamlinedConfig

    auto.AutoConfig.register(MODEL_TYPE, StreamlinedConfig, exist_ok=True)


class _Waiting(MetaPathFinder):
    """Finds nothing itself; has the registration run right after the module it waits for."""

    _looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register(module)

            loader.exec_module = exec_module
        return spec
