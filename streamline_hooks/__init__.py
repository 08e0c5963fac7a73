"""Find, remove and repair the transformer blocks that contribute least (LLM-Streamline, arXiv 2403.19135).

``__init__.pyi`` lists the public names. Each name is imported when it is first used.
"""

from __future__ import annotations

from types import ModuleType

import lazy_loader

from streamline_hooks.core import after_import

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register_checkpoints(auto: ModuleType) -> None:
    from streamline_hooks.surgery import MODEL_TYPE, StreamlinedConfig

    auto.AutoConfig.register(MODEL_TYPE, StreamlinedConfig, exist_ok=True)


# Transformers can load checkpoints with splices once its Auto classes know them. Importing these classes takes longer
# than importing this library, so registration waits until a program imports them.
after_import("transformers.models.auto.configuration_auto", _register_checkpoints)
