"""Make a shorter stack say the same everywhere: inside the blocks and in the configuration."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.surgery.splice import AFTER, BEFORE

INDEX_NAMES = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "layer_num"})
_ENOUGH_BLOCKS = 3

# Lists in a configuration that are never one entry a block, whatever their length.
_NOT_PER_BLOCK = ("token_id", "architectures", "bad_words", "_ids", "languages", "kernel", "image", "mrope_section")


@dataclass(frozen=True)
class IndexAttribute:
    """An attribute that holds a block's number.

    Attributes
    ----------
    path : str
        Submodule of the block, "" for the block itself.
    name : str
        The attribute on it.
    first : int
        The number of the first block, 0 or 1.
    """

    path: str
    name: str
    first: int = 0

    def holder(self, block: nn.Module) -> nn.Module | None:
        """The module of a block that carries the attribute, where it has it."""
        module: Any = block
        for part in filter(None, self.path.split(".")):
            module = module._modules.get(part)
            if module is None:
                return None
        return module if type(vars(module).get(self.name)) is int else None


def find_index_attributes(blocks: Sequence[nn.Module]) -> list[IndexAttribute]:
    """Find the attributes, at any depth, by which blocks know their number.

    An attribute counts if it equals the position in every block that has it, three at least: a Llama block has a
    ``num_key_value_groups`` that equals its number in one place. Under one of the usual names (``layer_idx``, ...)
    fewer blocks are enough, and counting may start at 1.

    Parameters
    ----------
    blocks : sequence of torch.nn.Module
        All blocks of a stack, in order.

    Returns
    -------
    list of IndexAttribute
    """
    values: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for position, block in enumerate(blocks):
        for path, name, value in _integers(block):
            values[path, name][position] = value
    found = []
    for (path, name), by_position in values.items():
        offsets = {value - position for position, value in by_position.items()}
        usual = name in INDEX_NAMES
        if offsets in ({0}, {1}) if usual else offsets == {0} and len(by_position) >= _ENOUGH_BLOCKS:
            found.append(IndexAttribute(path, name, offsets.pop()))
    return found


def shortened_config(config: Any, count_attribute: str, length: int, sources: Sequence[int]) -> dict[str, Any]:
    """The values that a configuration must have for a stack made of these blocks.

    Parameters
    ----------
    config : object
        The configuration that describes the stack.
    count_attribute : str
        Its attribute that holds the number of blocks.
    length : int
        The number of blocks that it describes now.
    sources : sequence of int
        For each slot of the new stack, the block whose per-layer values it has.

    Returns
    -------
    dict
        New values by attribute: the count, every list with one entry a block, and the overrides that are kept by a
        block's number.
    """
    new: dict[str, Any] = {count_attribute: len(sources)}
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == length and is_per_block(name):
            new[name] = type(value)(value[source] for source in sources)
    heterogeneity = vars(config).get("_heterogeneity_spec")
    if heterogeneity is not None:
        overrides = heterogeneity.per_layer_overrides
        heterogeneity = copy.copy(heterogeneity)
        heterogeneity.per_layer_overrides = {
            slot: copy.deepcopy(overrides[source]) for slot, source in enumerate(sources) if source in overrides
        }
        new["_heterogeneity_spec"] = heterogeneity
    return new


def is_per_block(name: str) -> bool:
    """Whether a list of this name can hold one entry a block."""
    return not any(part in name for part in _NOT_PER_BLOCK)


def _integers(block: nn.Module) -> Iterator[tuple[str, str, int]]:
    for path, module in block.named_modules():
        if path.split(".")[0] in (BEFORE, AFTER):
            continue
        for name, value in vars(module).items():
            if type(value) is int:
                yield path, name, value
