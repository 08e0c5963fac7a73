"""Whether a model is compressed block by block, and in how much memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamline_hooks.core import Processes
from streamline_hooks.pipeline.cost import blockwise_memory, checkpoint_bytes, dtype_growth, processes_here
from streamline_hooks.testing import tiny_model


def test_a_wider_dtype_takes_more_memory(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    size = checkpoint_bytes(tmp_path)
    assert dtype_growth(tmp_path, None) == dtype_growth(tmp_path, torch.bfloat16) == 1
    assert dtype_growth(tmp_path, torch.float32) == 2
    assert blockwise_memory(str(tmp_path), 2 * size, []) is None
    assert blockwise_memory(str(tmp_path), 2 * size, [], torch.float32) == 2 * size


def test_processes_share_the_memory_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    size = checkpoint_bytes(tmp_path)
    assert blockwise_memory(str(tmp_path), 2 * size, [], None, 1) is None
    assert blockwise_memory(str(tmp_path), 2 * size, [], None, 2) == size
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes_here(Processes(5, 8)) == 2 and processes_here(Processes()) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes_here(Processes(5, 8)) == 8
