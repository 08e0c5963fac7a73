"""Interrupt code of the library at any of its lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def interrupted_at(line: int, work: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt at the n-th line of the package that runs; False where fewer lines run."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if "streamline_hooks" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()  # a measurement of coverage
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= line
