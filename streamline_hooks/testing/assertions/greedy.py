"""How the assertions call ``generate``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

GREEDILY: Mapping[str, Any] = MappingProxyType(
    {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "eos_token_id": None,
        "stop_strings": None,
        "pad_token_id": 0,
    }
)
"""One text a row, of the likeliest tokens, as long as it was told to be, whatever a model's generation_config says."""
