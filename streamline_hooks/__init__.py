"""Find, remove and repair the transformer blocks that do least (LLM-Streamline, arXiv 2403.19135).

The public names are listed in ``__init__.pyi``, each is imported when it is first used.
"""

from __future__ import annotations

from types import ModuleType

import lazy_loader

from streamline_hooks.core.import_hook import after_import

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register_checkpoints(auto: ModuleType) -> None:
    from streamline_hooks.surgery.spliced_model import MODEL_TYPE, StreamlinedConfig

    auto.AutoConfig.register(MODEL_TYPE, StreamlinedConfig, exist_ok=True)


# Checkpoints with splices are known to Transformers once its Auto classes are there. They take longer to import than
# all of this library, and whoever loads a checkpoint imports them.
after_import("transformers.models.auto.configuration_auto", _register_checkpoints)
