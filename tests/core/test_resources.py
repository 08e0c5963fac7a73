"""Memory is freed before a retry, and measured in bytes."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch

from streamline_hooks.core.resources import peak_memory, retry_with_fewer_rows


class Node:
    """An object that refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_reference_cycles_are_freed_before_the_next_attempt() -> None:
    attempts: list[int] = []
    nodes: list[weakref.ref[Node]] = []

    def run(rows: int) -> bool:
        attempts.append(rows)
        if nodes:
            return nodes[0]() is None
        nodes.append(weakref.ref(Node()))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    gc.disable()
    try:
        assert retry_with_fewer_rows(run, 5) == [True]
    finally:
        gc.enable()
    assert attempts == [5, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc exists on Linux only")
def test_peak_memory_is_measured_in_bytes() -> None:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = peak_memory()
    assert peak is not None and peak > 0.5 * resident_pages * os.sysconf("SC_PAGE_SIZE")
