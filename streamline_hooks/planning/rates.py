"""How fast a machine reads, writes and computes: of one that is at hand, or of one by its data sheet."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from streamline_hooks.batch import Batch, tokens_of
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.residence import stored_bytes
from streamline_hooks.errors import StreamlineError
from streamline_hooks.planning.work import work_of
from streamline_hooks.repair.size import features_of
from streamline_hooks.stack import BlockStack

_WRITTEN = 2**26
_EIGEN = 1024  # a wider matrix is not decomposed to tell the rate


@dataclass(frozen=True)
class Rates:
    """Of one process.

    Attributes
    ----------
    products, sums, eigen : float
        FLOP/s of matrix products in the precision of the weights, of those in float64, and of eigendecompositions in
        float64, 10·d³ FLOPs each.
    read, write : float
        Bytes/s, of all processes together.
    processes : int
    """

    products: float
    sums: float
    eigen: float
    read: float
    write: float
    processes: int = 1


def h100(
    processes: int = 1, *, share: float = 0.4, eigen: float = 3e11, read: float = 3e9, write: float = 2e9
) -> Rates:
    """NVIDIA H100 SXM: 989 TFLOP/s dense in bfloat16 and 67 in float64, by its data sheet.

    Parameters
    ----------
    processes : int
        One a device.
    share : float
        Of these that is reached; 0.4 is what large matrices reach in training.
    eigen : float
        FLOP/s of eigendecompositions, which no data sheet has; an assumption, of a hundredth of the products' rate.
    read, write : float
        Bytes/s of the disk, which all processes share; by default those of one NVMe drive.

    Examples
    --------
    >>> f"{h100(8).products:.3g}"
    '3.96e+14'
    """
    return Rates(share * 989e12, share * 67e12, eigen, read, write, processes)


def rates_here(stack: BlockStack, batch: Batch, folder: str | Path | None = None) -> Rates:
    """Measure this machine with the first block of a checkpoint, in a few seconds.

    Parameters
    ----------
    stack : BlockStack
        Of a model from `open_checkpoint`.
    batch : mapping
        With ``input_ids`` of shape (batch, tokens).
    folder : str or Path, optional
        Where states would be written.

    Raises
    ------
    StreamlineError
        If the first block is in memory, so that it cannot be told how fast blocks are read.

    Notes
    -----
    One and four batches go through the block; the difference is what computing takes, the rest of the first time
    reading. What the system still holds of a file is read faster than the disk has it.
    """
    block = stack.blocks[0]
    size = stored_bytes(block)
    if not size:
        raise StreamlineError("The first block is in memory, not on disk; open the checkpoint with open_checkpoint.")

    def through(count: int) -> float:
        with BlockwisePass(stack.model, [batch] * count, stop=1, check=False, stack=stack.path, what="rates") as states:
            places = iter(states)
            next(places)
            return _seconds(lambda: next(places))

    first, one, four = through(1), through(1), through(4)
    computing = max(1e-9, (four - one) / 3)
    length, tokens = int(batch["input_ids"].shape[1]), tokens_of(batch)
    width = features_of(stack)
    states = torch.randn(tokens, width, dtype=torch.float64)
    summing = min(_seconds(lambda: states.T @ states) for _ in range(2))
    square = torch.randn(min(width, _EIGEN), min(width, _EIGEN), dtype=torch.float64)
    decomposing = min(_seconds(lambda: torch.linalg.eigh(square @ square.T)) for _ in range(2))
    return Rates(
        work_of(stack)[0].flops(length) * tokens / computing,
        2 * tokens * width**2 / summing,
        10 * len(square) ** 3 / decomposing,
        size / max(1e-9, first - computing),
        write_rate(folder),
    )


def write_rate(folder: str | Path | None = None) -> float:
    """Bytes/s that are written to a folder, by default that of temporary files, and have arrived on its disk.

    One that is not there yet is told by the nearest above it.

    Raises
    ------
    StreamlineError
        If nothing can be written there.

    Examples
    --------
    >>> write_rate() > 0
    True
    """
    wanted = Path(tempfile.gettempdir() if folder is None else folder).absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    try:
        return _WRITTEN / _seconds(lambda: write_test_file(there))
    except OSError as error:
        raise StreamlineError(
            f"{there} cannot be written to, which the model is going to be: {error.strerror}. Choose another folder, "
            "or make room there."
        ) from error


def write_test_file(folder: Path) -> None:
    """Write and sync a temporary file, to time the disk."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(2**20) * (_WRITTEN // 2**20))
        file.flush()
        os.fsync(file.fileno())


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
