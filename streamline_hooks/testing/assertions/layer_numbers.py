"""Blocks that say of themselves a number that is not theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.renumber import INDEX_NAMES


def numbers_said(blocks: Sequence[nn.Module]) -> dict[tuple[str, str], dict[int, int]]:
    """What blocks say their number is, by the attribute's path below the block and its name, and by the position."""
    said: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for position, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name in INDEX_NAMES & vars(module).keys():
                value = vars(module)[name]
                if type(value) is int:
                    said[path, name][position] = value
    return dict(said)


def wrong_numbers(stack: BlockStack) -> list[str]:
    """Sentences on blocks whose number is not their position in the stack.

    Two blocks of one number, and a count that does not begin at 0 (or 1, for those that count from there), are what a
    cache stumbles over.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama", blocks=4)
    >>> wrong_numbers(find_stack(model))
    []
    >>> model.model.layers[2].self_attn.layer_idx = 3
    >>> wrong_numbers(find_stack(model))
    ['layer_idx of block 2 (model.layers.2.self_attn) says 3']
    """
    found = []
    names = [name for name, _ in stack.container.named_children()]
    for (path, name), by_position in numbers_said(stack.blocks).items():
        shifts = [value - position for position, value in by_position.items()]
        expected = 1 if name == "layer_number" and shifts.count(1) > shifts.count(0) else 0
        evenly = len(shifts) > 1 and len(set(shifts)) == 1
        if not evenly and 2 * shifts.count(expected) <= len(shifts):
            continue  # numbers of something else, such as of attentions shared by several blocks
        for position, value in by_position.items():
            if value != position + expected:
                where = ".".join(filter(None, (stack.path, names[position], path)))
                found.append(f"{name} of block {position} ({where}) says {value}")
    return found
