"""Blocks that inherit, against those that they inherit from."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.repair.inherited_blocks import InheritedBlocks, inherit_blocks, inherit_without_attention
from streamline_hooks.surgery import BEFORE, spliced
from tests.repair.replacement_modules import leaving
from tests.tiny_models import FAMILIES, Nudge, tiny_model, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_windows_first_block_and_shares_nothing(family: str) -> None:
    model = tiny_model(family)
    stack = find_stack(model)
    model.requires_grad_(False)
    (first, second) = inherit_blocks(stack, range(1, 4), 2)
    for copied, original in ((first, stack[1]), (second, stack[2])):
        pairs = list(zip(copied.named_parameters(), original.named_parameters(), strict=True))
        assert all(a == b and torch.equal(p, q) and p.data_ptr() != q.data_ptr() for (a, p), (b, q) in pairs)
        assert all(p.requires_grad for p in copied.parameters())
    assert torch.equal(
        leaving(model, range(1, 4), tokens(2, 9), inherit_blocks(stack, range(1, 4))),
        leaving(model, range(1, 2), tokens(2, 9)),
    )
    assert torch.equal(
        leaving(model, range(1, 4), tokens(2, 9), InheritedBlocks([first, second])),
        leaving(model, range(1, 3), tokens(2, 9)),
    )


def test_what_is_spliced_beside_a_block_is_not_inherited() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, Nudge())
        block = inherit_blocks(find_stack(model), range(2, 4))
        assert spliced(find_stack(model)[2], BEFORE) and not spliced(block, BEFORE)
        assert not block._forward_pre_hooks


def test_under_meta_a_copy_takes_no_memory() -> None:
    stack = find_stack(tiny_model("llama"))
    with torch.device("meta"):
        copied = inherit_blocks(stack, range(2, 4))
    assert all(p.is_meta for p in copied.parameters()) and not any(p.is_meta for p in stack[2].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zeroed_block_is_the_block_without_what_its_attention_adds(family: str) -> None:
    model = tiny_model(family)
    block = inherit_without_attention(find_stack(model), range(2, 4))
    got = leaving(model, range(2, 4), tokens(2, 9), block)
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(2, "attention")
        torch.testing.assert_close(got, leaving(model, range(2, 3), tokens(2, 9)))
    frozen = [p for p in block.parameters() if not p.requires_grad]
    assert frozen and not any(bool(p.any()) for p in frozen)
    assert not torch.equal(got, leaving(model, range(2, 3), tokens(2, 9)))


def test_what_cannot_be_inherited() -> None:
    stack = find_stack(tiny_model("llama"))
    with pytest.raises(UnsupportedSurgery, match=r"1 inherited.*window of 1 .*block 3"):
        inherit_blocks(stack, range(3, 4))
    with pytest.raises(UnsupportedSurgery, match=r"3 inherited.*window of 3 .*block 0"):
        inherit_blocks(stack, range(0, 3), 3)
