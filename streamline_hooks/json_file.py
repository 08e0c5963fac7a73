"""Parse JSON of any origin, and write a JSON file that is always whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamline_hooks.core.files import atomic_file


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, and raise `json.JSONDecodeError` also for a text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON values to a file atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_file(path) as new:
        new.write_text(text, encoding="utf-8")
