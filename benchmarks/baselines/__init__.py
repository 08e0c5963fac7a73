"""Published methods for comparison, implemented with the public interface of the library.

Importing this package registers their replacements and criteria and adds their presets to `PRESETS`.

Examples
--------
>>> import benchmarks.baselines
>>> from streamline_hooks import CompressionConfig
>>> CompressionConfig.preset("ghosted").repair
GhostedConfig(seed=None)
"""

from __future__ import annotations

from benchmarks.baselines import entro_drop as entro_drop
from benchmarks.baselines import ghosted, linear_patch, prune_and_comp, replace_me, uidl
from streamline_hooks.pipeline import PRESETS

BASELINES = tuple(method.PRESET.name for method in (replace_me, linear_patch, ghosted, prune_and_comp, uidl))
"""Names of the presets of the methods."""

for _method in (replace_me, linear_patch, ghosted, prune_and_comp, uidl):
    PRESETS.add(_method.PRESET.name, _method.PRESET)
