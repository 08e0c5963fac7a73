"""Whether a checkpoint fits into memory, and how much of it states may take where it does not."""

from __future__ import annotations

import re
from pathlib import Path

from streamline_hooks.errors import StreamlineError
from streamline_hooks.planning.plan import Plan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_BESIDE = 1.25  # of the weights: what a pass takes beside them
_LEAST = 2**25  # bytes of states that are always allowed


def parse_bytes(text: str) -> int:
    """Read a size such as ``2GB``, ``512 MiB`` or ``2e9`` without its exponent.

    Raises
    ------
    StreamlineError
        If it is none.

    Examples
    --------
    >>> parse_bytes("2GB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (2000000000, 1610612736, 4096)
    """
    found = _SIZE.fullmatch(text)
    if found is None or not float(found[1]):
        raise StreamlineError(f"{text!r} is no size; expected one above zero such as 2GB, 512MiB or 4096.")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of the weights in a folder's safetensors files; 0 where there are none.

    Examples
    --------
    >>> import tempfile
    >>> checkpoint_bytes(tempfile.mkdtemp())
    0
    """
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def free_memory() -> int:
    """Bytes that this machine can give without swapping."""
    import psutil  # accelerate brings it

    return int(psutil.virtual_memory().available)


def fits(folder: str | Path, memory: int) -> bool:
    """Whether the model of a folder can be run in so many bytes, by the size of its files."""
    return checkpoint_bytes(folder) * _BESIDE <= memory


def states_budget(plan: Plan, memory: int) -> int:
    """Bytes that states may take in memory beside all else.

    Parameters
    ----------
    plan : Plan
        Of a run without any states in memory.
    memory : int
        Bytes for the whole process, what it has taken already among them.

    Raises
    ------
    StreamlineError
        If the rest takes as much already.
    """
    import psutil

    taken = psutil.Process().memory_info().rss + plan.resident
    if taken + _LEAST > memory:
        raise StreamlineError(
            f"--memory {memory / 1e9:.2f}GB does not suffice: what is no block of the model, its largest block, a "
            f"solution of least squares and Python itself take about {taken / 1e9:.2f} GB. Allow at least "
            f"{(taken + _LEAST) / 1e9:.2f}GB."
        )
    return memory - taken
