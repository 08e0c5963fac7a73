"""The command that is running, as it could be typed again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """The command with its arguments, quoted where a shell needs it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
