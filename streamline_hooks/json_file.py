"""Write a JSON file that is always whole."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON values to a file, which takes the place of an earlier one at the end.

    Raises
    ------
    StreamlineError
        If the file cannot be written; an earlier one is as it was.
    """
    target = Path(path)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".writing", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    except OSError as error:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        raise StreamlineError(f"{target} cannot be written: {error}. Make room, or name another place.") from error
