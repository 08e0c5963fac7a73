"""Rates of this machine, and what a compression block by block costs at them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamline_hooks.blockwise.residence import resident, stored_bytes
from streamline_hooks.core.tables import table
from streamline_hooks.errors import StreamlineError
from streamline_hooks.pipeline.flops import Rates, StageWork
from streamline_hooks.repair.stand_in import features_of
from streamline_hooks.stack import BlockStack

if TYPE_CHECKING:
    from streamline_hooks.pipeline.config import CompressionConfig


def measure_rates(stack: BlockStack, config: CompressionConfig, folder: Path) -> Rates:
    """Measure this machine with the first block of a model from `open_checkpoint`; `folder` is where states go."""
    tokens, width = config.hardware.batch_size * config.data.sequence_length, features_of(stack)

    def seconds(action: Callable[[], Any], warm_up: bool = True) -> float:
        if warm_up:
            action()
        began = time.perf_counter()
        action()
        return max(1e-9, time.perf_counter() - began)

    def read() -> None:
        with resident(stack.blocks[0]):
            pass

    def products(dtype: torch.dtype) -> float:
        states, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        return 2 * tokens * width**2 / seconds(lambda: states @ weight)

    square = torch.randn(min(width, 1024), min(width, 1024), dtype=torch.float64)
    return Rates(
        products(next(p.dtype for p in stack.blocks[0].parameters())),
        products(torch.float64),
        10 * len(square) ** 3 / seconds(lambda: torch.linalg.eigh(square @ square.T)),
        stored_bytes(stack.blocks[0]) / seconds(read, warm_up=False),
        write_rate(folder),
    )


def blockwise_table(stages: Sequence[StageWork], rates: Rates) -> str:
    """Return a table of a compression block by block for a terminal."""
    rows: list[tuple[str, ...]] = []
    for one in stages:
        flops = f"{one.products + one.float64 + one.eigen:.1e}"
        rows.append((one.name, *map(size, (one.read, one.written, one.states)), flops, duration(one.seconds(rates))))
    rows.append(("total", *[""] * 4, duration(sum(one.seconds(rates) for one in stages))))
    return table(rows, ("stage", "reads", "writes", "states", "FLOPs", "time"))


def checkpoint_bytes(folder: str | Path) -> int:
    """Return the bytes of a folder's safetensors files; 0 if there are none."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def fits_in_memory(folder: str | Path, memory: int) -> bool:
    """Whether the model of a folder can be run in so many bytes, with a quarter of its size for everything else."""
    return 1.25 * checkpoint_bytes(folder) <= memory


def state_budget(resident: int, memory: int) -> int:
    """Return the bytes left for hidden states in a process that may take `memory` and needs `resident` more.

    Raises
    ------
    StreamlineError
        If less than 32 MB are left.
    """
    import psutil

    taken = psutil.Process().memory_info().rss + resident
    if taken + 2**25 > memory:
        raise StreamlineError(
            f"--memory {memory / 1e9:.2f}GB does not suffice: the largest block, everything outside the blocks, a "
            f"least-squares solution and Python take {taken / 1e9:.2f} GB. Allow {(taken + 2**25) / 1e9:.2f}GB or more."
        )
    return memory - taken


def write_rate(folder: str | Path, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the bytes/s that are written and synced to a folder, or to the nearest one above it that exists."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.is_dir())
    content, count = os.urandom(2**20), 64
    began = clock()
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.writelines([content] * count)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StreamlineError(
            f"{there} cannot be written to: {error.strerror}. Expected {count * 2**20:,} bytes free. Choose another "
            "folder."
        ) from error
    return count * 2**20 / max(1e-9, clock() - began)


def duration(seconds: float) -> str:
    """Return a time for a terminal.

    Examples
    --------
    >>> duration(4.2), duration(42.0), duration(630.0), duration(9000.0)
    ('4.2 s', '42 s', '10.5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes for a terminal."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
