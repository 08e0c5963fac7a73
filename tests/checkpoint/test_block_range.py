"""States that go through some of the blocks beside those of the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.checkpoint.streaming import BlockRange, BlockwisePass
from streamline_hooks.surgery import resume
from tests.checkpoint.block_by_block import calibration, places
from tests.tiny_models import tiny_model


def test_others_go_through_the_blocks_from_where_they_were_put_in(tmp_path: Path) -> None:
    model, batches = tiny_model("gemma3"), calibration()
    wanted = places(model, batches)
    ways = [BlockRange(2, 1, 4), BlockRange(0, 3, 6), BlockRange(0, 6, 6), BlockRange(1, 0, 0)]
    entered = [2 * wanted[way.batch][way.start] for way in ways]
    with BlockwisePass(model, batches, others=ways) as states:
        for place in states:
            for number, (way, state) in enumerate(zip(ways, entered, strict=True), start=len(batches)):
                if way.start == place:
                    states.add(number, state)
        for number, expected in enumerate(wanted):
            assert torch.equal(states.read(6, number), expected[6])
        with pytest.raises(StreamlineError, match="cannot be read"):
            states.read(5, 4)
        assert torch.equal(states.read(6, 6), entered[2]) and torch.equal(states.read(0, 7), entered[3])
        seen: list[torch.Tensor] = []
        model.model.layers[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            resume(model, 1, entered[0], batches[2])
        assert torch.equal(states.read(4, 4), seen[0])
        assert torch.equal(states.read(6, 5)[0, 0], states.read(6, 5)[0, 0]) and states.read(6, 5).shape[1] == 11
