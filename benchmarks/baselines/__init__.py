"""Published methods to compare with, written as a user of the library would write them.

Importing this package registers their kinds of replacement and adds their presets to `PRESETS`.

Examples
--------
>>> import benchmarks.baselines
>>> from streamline_hooks import CompressionConfig
>>> CompressionConfig.preset("ghosted").repair
GhostedConfig(seed=None)
"""

from __future__ import annotations

from benchmarks.baselines import ghosted, linear_patch, prune_and_comp, replace_me, uidl
from streamline_hooks import PRESETS

BASELINES = tuple(method.PRESET.name for method in (replace_me, linear_patch, ghosted, prune_and_comp, uidl))
"""Names of the presets."""

for _method in (replace_me, linear_patch, ghosted, prune_and_comp, uidl):
    PRESETS.add(_method.PRESET.name, _method.PRESET)
