"""Whether packed rows are kept apart, with each block read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from streamline_hooks.checkpoint.offloaded import open_checkpoint
from streamline_hooks.checkpoint.streaming import check_packing_blockwise
from streamline_hooks.core import StreamlineError
from streamline_hooks.data import check_packing as refuse_in_memory
from streamline_hooks.data import packed_batches
from streamline_hooks.testing import tiny_model
from tests.checkpoint.block_by_block import reads, written  # noqa: F401

PACKED = packed_batches([[range(3, 9), range(10, 14)], [range(20, 25), range(7, 10), [5, 9]]], batch_size=2)


def test_each_block_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, _ = written(tmp_path)
    model = open_checkpoint(folder)
    before = dict(reads)
    check_packing_blockwise(model, PACKED)
    for k in range(6):
        name = f"model.layers.{k}.mlp.up_proj.weight"
        assert reads[name] - before.get(name, 0) == 1, k


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_it_says_what_is_said_in_memory(family: str) -> None:
    """GPT-2 is given positions of its own; what it does to the mask is the version's affair, and both must see it."""
    said = []
    for check in (check_packing_blockwise, refuse_in_memory):
        try:
            check(tiny_model(family), PACKED)
            said.append("")
        except StreamlineError as error:
            said.append(str(error))
    assert said[0] == said[1]
    assert family == "gpt2" or "leaves block 0" in said[0]


def test_rows_of_one_document_are_not_run() -> None:
    """Counted by hooks, which see a run of divided rows up to the block that is refused."""
    calls: list[str] = []
    model = tiny_model("bloom")
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    check_packing_blockwise(model, packed_batches([[range(3, 9)], [range(9, 15)]], batch_size=2))
    assert calls == []
    with pytest.raises(StreamlineError, match="block 0"):
        check_packing_blockwise(model, PACKED)
    assert "transformer.h.0" in calls
