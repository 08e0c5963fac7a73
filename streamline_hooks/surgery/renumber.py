"""Make a shorter stack say the same everywhere: inside the blocks and in the configuration."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.splice import AFTER, BEFORE

INDEX_NAMES = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "layer_num"})
_ENOUGH_BLOCKS = 3

# Lists in a configuration that are never one entry a block, whatever their length.
_NOT_PER_BLOCK = ("token_id", "architectures", "bad_words", "_ids", "languages", "kernel", "image", "mrope_section")

# Attributes that speak of blocks by number: how many of the first ones are built otherwise, which one is the last
# to be built otherwise, how many of the last ones are, and which ones are.
_LEADING_COUNTS = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
_LAST_NUMBERS = ("moe_layer_end_index",)
_TRAILING_COUNTS = ("num_kv_shared_layers",)
# Derived from that: which blocks' keys later ones read; `shared-keys` in hazards.py, and Edits, know what it means.
KEY_SHARING = "kv_sharing_modes"
_BLOCK_NUMBERS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "ple_layer_ids",
    "rope_scaling_layers",
)
# A scale that is divided by the square root of the number of blocks; a pattern that is repeated over the
# blocks; another name for the count.
_DEPTH_SCALES = ("scale_depth",)
_PATTERNS = ("block_types",)
_ALIASES = ("num_blocks",)
# How T5 counts its decoder's blocks, and by what Transformers sizes the cache of a model with an encoder.
_DECODER_COUNT, _CACHE_COUNT = "num_decoder_layers", "decoder_layers"


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
        The number of the first block.
    stride : int
        By how much it grows from block to block: 2 in blocks with two attentions.
    """

    path: str
    name: str
    first: int = 0
    stride: int = 1

    def of(self, position: int) -> int:
        """The number at a position."""
        return self.first + self.stride * position

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
    fewer blocks are enough, counting may start at 1, and a block with several attentions may count each. What
    grows evenly over all of four blocks or more counts blocks too, whatever its name.

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
        usual, positions = name in INDEX_NAMES, sorted(by_position)
        if not usual and len(positions) < _ENOUGH_BLOCKS:
            continue
        everywhere = len(positions) == len(blocks) > _ENOUGH_BLOCKS
        stride = 1
        if everywhere or (usual and len(positions) >= _ENOUGH_BLOCKS):
            stride = (by_position[positions[1]] - by_position[positions[0]]) // (positions[1] - positions[0])
        firsts = {value - stride * position for position, value in by_position.items()}
        first = firsts.pop()
        if not firsts and stride >= 1 and (first == 0 or everywhere or (usual and 0 <= first <= stride)):
            found.append(IndexAttribute(path, name, first, stride))
    return found


def same_descriptions(stack: BlockStack) -> list[Any]:
    """Every configuration object that describes a stack: a model can hand copies to its parts.

    Those of the models around it and of the modules inside its owner count, and no others: another stack of the same
    class and length has its own.
    """
    config, count = stack.config, stack.count_attribute
    if count is None:
        return []
    found = {id(config): config}
    for module in [*stack.ancestors, *stack.ancestors[-1].modules()]:
        other = getattr(module, "config", None)
        # Not of equal types: with splices in another stack, one is of a class that is derived from the other's.
        alike = isinstance(other, type(config)) or isinstance(config, type(other))
        if alike and getattr(other, count, None) == getattr(config, count, None):
            found[id(other)] = other
    return list(found.values())


def shortened_config(
    config: Any, count_attribute: str, length: int, sources: Sequence[int | None], stage: int | None = None
) -> dict[str, Any]:
    """The values that a configuration must have for a stack made of these blocks.

    Parameters
    ----------
    config : object
        The configuration that describes the stack.
    count_attribute : str
        Its attribute that holds the number of blocks.
    length : int
        The number of blocks that it describes now.
    sources : sequence of int or None
        For each slot of the new stack, the block whose per-layer values it has; None where that is not known.
    stage : int, optional
        The entry of the count that is this stack's, where it is a list; other lists then have an entry a stage.

    Returns
    -------
    dict
        New values by attribute: the count, every list with one entry a block, what speaks of blocks by their number,
        and the overrides that are kept by it.

    Raises
    ------
    StreamlineError
        If a block that was put in needs values of its own and does not say which.
    UnsupportedSurgery
        If two states that a vision backbone gives would be one.
    """
    if stage is not None:
        depths = getattr(config, count_attribute)
        return {count_attribute: type(depths)(len(sources) if k == stage else depth for k, depth in enumerate(depths))}
    if None in sources:
        known = shortened_config(config, count_attribute, length, [0 if s is None else s for s in sources])
        own = {count_attribute, "stage_names", "_out_indices", "_out_features"}
        differing = [name for name in known if name not in own and not _uniform(vars(config)[name])]
        if differing:
            raise StreamlineError(
                "A block that was put in does not say which block's per-layer settings it has "
                f"({', '.join(sorted(differing))} differ from block to block). Insert a copy of one of the model's own "
                "blocks."
            )
        return known
    origins = [source for source in sources if source is not None]
    # A count that is derived (from the length of a list, say) follows by itself.
    new: dict[str, Any] = {count_attribute: len(origins)} if count_attribute in vars(config) else {}
    for name, value in vars(config).items():
        if name in _LEADING_COUNTS and isinstance(value, int):
            new[name] = sum(source < value for source in origins)
        elif name in _LAST_NUMBERS and isinstance(value, int) and value >= 0:
            new[name] = sum(source <= value for source in origins) - 1
        elif name in _TRAILING_COUNTS and isinstance(value, int):
            new[name] = sum(source >= length - value for source in origins)
        elif name in _DEPTH_SCALES and isinstance(value, (int, float)):
            new[name] = value * math.sqrt(len(origins) / length)
        elif name in _PATTERNS and isinstance(value, (list, tuple)):
            new[name] = type(value)(value[source % len(value)] for source in origins)
        elif name in _ALIASES and value == length:
            new[name] = len(origins)
        elif name in _BLOCK_NUMBERS and isinstance(value, (list, tuple)):
            new[name] = type(value)(slot for slot, source in enumerate(origins) if source in value)
        elif isinstance(value, (list, tuple)) and len(value) == length and is_per_block(name):
            new[name] = type(value)(value[source] for source in origins)
    decoder_count = new.get(_DECODER_COUNT, vars(config).get(_DECODER_COUNT))
    if isinstance(decoder_count, int) and _needs_decoder_count(config, new, decoder_count):
        new[_CACHE_COUNT] = decoder_count
    names = vars(config).get("stage_names")
    if isinstance(names, (list, tuple)) and len(names) == length + 1:
        new |= _outputs_of_a_backbone(config, list(names), origins)
    heterogeneity = vars(config).get("_heterogeneity_spec")
    if heterogeneity is not None:
        overrides = heterogeneity.per_layer_overrides
        heterogeneity = copy.copy(heterogeneity)
        heterogeneity.per_layer_overrides = {
            slot: copy.deepcopy(overrides[source]) for slot, source in enumerate(origins) if source in overrides
        }
        new["_heterogeneity_spec"] = heterogeneity
    return new


def _needs_decoder_count(config: Any, new: dict[str, Any], decoder_count: int) -> bool:
    """Whether the decoder's count must be repeated where ``generate`` reads the size of its cache.

    T5 and its relatives count the encoder's blocks by ``num_layers`` and the decoder's by ``num_decoder_layers``.
    Transformers sizes the cache by ``num_layers``, unless the configuration has ``decoder_layers``.
    """
    if _CACHE_COUNT in vars(config):
        return True
    encoder_count = str(getattr(type(config), "attribute_map", {}).get("num_hidden_layers"))
    if not getattr(config, "is_encoder_decoder", False) or encoder_count not in vars(config):
        return False
    return bool(new.get(encoder_count, vars(config)[encoder_count]) < decoder_count)


def _outputs_of_a_backbone(config: Any, names: list[str], origins: Sequence[int]) -> dict[str, Any]:
    """Which states a vision backbone gives: those behind the same blocks, or behind the last one left before them."""
    asked = [k % len(names) for k in vars(config).get("_out_indices") or []]
    moved = [sum(source < k for source in origins) for k in asked]
    if len(set(moved)) < len(moved):
        raise UnsupportedSurgery(
            f"{type(config).__name__} gives the states {', '.join(names[k] for k in asked)}, and no block would stay "
            "between two of them. Choose other blocks, or other out_indices.",
            "configuration",
        )
    left = names[: len(origins) + 1]
    return {"stage_names": left, "_out_indices": moved, "_out_features": [left[k] for k in moved]}


def _uniform(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(v == value[0] for v in value)


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
