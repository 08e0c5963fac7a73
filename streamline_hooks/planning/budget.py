"""Whether a checkpoint fits into memory, and how much of it states may take where it does not."""

from __future__ import annotations

from pathlib import Path

from streamline_hooks.errors import StreamlineError
from streamline_hooks.planning.plan import Plan

_BESIDE = 1.25  # of the weights: what a pass takes beside them
_LEAST = 2**25  # bytes of states that are always allowed


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
