"""Find what a shorter stack changes: block indices, values of the configuration, and copies of these values."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling import BlockStack
from streamline_hooks.surgery.splice import AFTER, BEFORE

INDEX_NAMES = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "layer_num"})
_MIN_BLOCKS = 3

# Lists in a configuration that never have one entry per block, regardless of their length.
_NOT_PER_BLOCK = (
    "token_id",
    "architectures",
    "bad_words",
    "_ids",
    "languages",
    "kernel",
    "image",
    "mrope_section",
    "conv_",
    "tdnn_",
    "suppress_tokens",
)

# Attributes that refer to blocks by index: how many of the first ones are built differently, the last of the blocks
# that are built differently, how many of the last ones are, and which ones are.
_LEADING_COUNTS = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
_LAST_NUMBERS = ("moe_layer_end_index",)
_TRAILING_COUNTS = ("num_kv_shared_layers",)
# Derived from them: the blocks whose keys later blocks read. See `shared-keys` in hazards.py, and Edits.
KEY_SHARING = "kv_sharing_modes"
_BLOCK_NUMBERS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
)
_BLOCK_NUMBERS_FROM_1 = ("ple_layer_ids",)
# The blocks after which the model reads a state, in order.
_READ_AFTER = ("backbone_out_indices", "deepstack_visual_indexes")
# A list with one entry per block, the number of the block whose keys it reads.
_SOURCES = ("kv_source_layers",)
# A scale divided by the square root of the number of blocks; a pattern repeated over the blocks; another name for the
# number of blocks.
_DEPTH_SCALES = ("scale_depth",)
_PATTERNS = ("block_types",)
_ALIASES = ("num_blocks",)
# The number of decoder blocks in T5, and the attribute from which Transformers sizes an encoder-decoder's cache.
_DECODER_COUNT, _CACHE_COUNT = "num_decoder_layers", "decoder_layers"
# An owner's index of the first of the blocks that the configuration counts from the end.
_FIRST_NUMBERS = {"first_kv_shared_layer_idx": "num_kv_shared_layers"}
# A block's index of another block whose keys it reads (Gemma 3n in Transformers 4).
_NUMBERS_OF_OTHER_BLOCKS = ("kv_shared_layer_index",)


@dataclass(frozen=True)
class IndexAttribute:
    """An attribute that contains the index of a block."""

    path: str
    """Submodule of the block; "" for the block itself."""
    name: str
    """Name of the attribute."""
    first: int = 0
    """Index of the first block."""
    stride: int = 1
    """Difference between consecutive blocks: 2 in blocks with two attentions."""

    def of(self, position: int) -> int:
        """Return the index at a position in the stack."""
        return self.first + self.stride * position

    def holder(self, block: nn.Module) -> nn.Module | None:
        """Return the submodule of a block that has the attribute, or None."""
        try:
            module = block.get_submodule(self.path)
        except AttributeError:
            return None
        return module if type(vars(module).get(self.name)) is int else None


def find_index_attributes(blocks: Sequence[nn.Module]) -> list[IndexAttribute]:
    """Find the attributes, at any depth, that contain the index of their block; `blocks` are in order.

    An attribute is an index if it equals the position in every block that has it, and at least three blocks do: a Llama
    block has a ``num_key_value_groups`` that equals its position in one block. For the usual names (``layer_idx``, ...)
    fewer blocks are sufficient, counting may start at 1, and a block with several attentions may count each of them. An
    attribute that grows evenly over all of at least four blocks is an index regardless of its name.
    """
    values: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for position, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items() if path.split(".")[0] not in (BEFORE, AFTER) else ():
                if type(value) is int:
                    values[path, name][position] = value
    indices = []
    for (path, name), by_position in values.items():
        usual_name, positions = name in INDEX_NAMES, sorted(by_position)
        if not usual_name and len(positions) < _MIN_BLOCKS:
            continue
        in_all_blocks = len(positions) == len(blocks) > _MIN_BLOCKS
        stride = 1
        if in_all_blocks or (usual_name and len(positions) >= _MIN_BLOCKS):
            stride = (by_position[positions[1]] - by_position[positions[0]]) // (positions[1] - positions[0])
        firsts = {value - stride * position for position, value in by_position.items()}
        first = firsts.pop()
        if not firsts and stride >= 1 and (first == 0 or in_all_blocks or (usual_name and 0 <= first <= stride)):
            indices.append(IndexAttribute(path, name, first, stride))
    return indices


def configs_of_stack(stack: BlockStack) -> list[Any]:
    """Return all configuration objects that describe a stack, since a model may pass copies to its modules.

    Only those of the models around the stack, and of the modules inside its owner, are returned. Another stack of the
    same class and length has its own.
    """
    config, count = stack.config, stack.count_attribute
    if count is None:
        return []
    configs = {id(config): config}
    for module in [*stack.ancestors, *stack.ancestors[-1].modules()]:
        other = getattr(module, "config", None)
        # Types may differ: with splices in another stack, one class is derived from the other.
        same_class = isinstance(other, type(config)) or isinstance(config, type(other))
        if same_class and getattr(other, count, None) == getattr(config, count, None):
            configs[id(other)] = other
    return list(configs.values())


def config_for_blocks(
    config: Any, count_attribute: str, length: int, sources: Sequence[int | None], stage: int | None = None
) -> dict[str, Any]:
    """Return the values that a configuration must have for a stack of the blocks `sources`.

    These are the number of blocks, lists with one entry per block, block indices, and overrides by index. `length` is
    the current number of blocks. A source of None is a block with unknown per-layer values. `stage` is the entry of
    this stack in a configuration of stages, whose count is a list.

    Raise `StreamlineError` if a new block needs per-layer values, and `UnsupportedSurgery` if two states that the model
    reads would coincide.
    """
    if stage is not None:
        depths = getattr(config, count_attribute)
        return {count_attribute: type(depths)(len(sources) if k == stage else depth for k, depth in enumerate(depths))}
    if None in sources:
        values_known = config_for_blocks(config, count_attribute, length, [0 if s is None else s for s in sources])
        count_names = {count_attribute, _CACHE_COUNT, "stage_names", "_out_indices", "_out_features"}
        values = {name: vars(config).get(name) for name in values_known if name not in count_names}
        differing = [n for n, v in values.items() if not isinstance(v, (list, tuple)) or any(e != v[0] for e in v)]
        if differing:
            raise StreamlineError(
                "The per-layer settings of a new block are unknown, and "
                f"{', '.join(sorted(differing))} differ from block to block. Insert a copy of one of the model's own "
                "blocks."
            )
        return values_known
    origins = [source for source in sources if source is not None]
    # A derived count, for instance from the length of a list, is not set.
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
        elif name in _BLOCK_NUMBERS_FROM_1 and isinstance(value, (list, tuple)):
            new[name] = type(value)(slot + 1 for slot, source in enumerate(origins) if source + 1 in value)
        elif name in _READ_AFTER and isinstance(value, (list, tuple)):
            new[name] = type(value)(_last_remaining(config, name, value, origins))
        elif name in _SOURCES and isinstance(value, (list, tuple)):
            # -1, which Transformers refuses, if the block with the keys is removed
            slots = {source: slot for slot, source in enumerate(origins)}
            new[name] = type(value)(slots.get(value[source], -1) for source in origins)
        elif not isinstance(value, (list, tuple)) or any(part in name for part in _NOT_PER_BLOCK):
            continue
        elif len(value) == length:
            new[name] = type(value)(value[source] for source in origins)
    decoder_count = new.get(_DECODER_COUNT, vars(config).get(_DECODER_COUNT))
    if isinstance(decoder_count, int) and _needs_decoder_count(config, new, decoder_count):
        new[_CACHE_COUNT] = decoder_count
    names = vars(config).get("stage_names")
    if isinstance(names, (list, tuple)) and len(names) == length + 1:
        new |= _backbone_outputs(config, list(names), origins)
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
    """Whether the decoder's block count must be repeated where ``generate`` reads the size of its cache.

    T5 and related models count the encoder's blocks by ``num_layers`` and the decoder's by ``num_decoder_layers``.
    Transformers sizes the cache by ``num_layers``, unless the configuration has ``decoder_layers``.
    """
    if _CACHE_COUNT in vars(config):
        return True
    encoder_count = str(getattr(type(config), "attribute_map", {}).get("num_hidden_layers"))
    if not getattr(config, "is_encoder_decoder", False) or encoder_count not in vars(config):
        return False
    return bool(new.get(encoder_count, vars(config)[encoder_count]) < decoder_count)


def _last_remaining(config: Any, name: str, numbers: Sequence[int], origins: Sequence[int]) -> list[int]:
    """Return the new index of the last remaining block up to each block after which a state is read."""
    indices = [sum(source <= number for source in origins) - 1 for number in numbers]
    if -1 in indices or len(set(indices)) < len(indices):
        raise UnsupportedSurgery(
            f"{type(config).__name__} reads the states after blocks {', '.join(map(str, numbers))} ({name}), and no "
            "block would remain before the first or between two of them. Choose other blocks.",
            "configuration",
        )
    return indices


def _backbone_outputs(config: Any, names: list[str], origins: Sequence[int]) -> dict[str, Any]:
    """Return the outputs of a vision backbone: after the same blocks, or after the last remaining block before them."""
    indices = [k % len(names) for k in vars(config).get("_out_indices") or []]
    new_indices = [sum(source < k for source in origins) for k in indices]
    if len(set(new_indices)) < len(new_indices):
        raise UnsupportedSurgery(
            f"{type(config).__name__} returns the states {', '.join(names[k] for k in indices)}, and no block would "
            "remain between two of them. Choose other blocks, or other out_indices.",
            "configuration",
        )
    new_names = names[: len(origins) + 1]
    return {"stage_names": new_names, "_out_indices": new_indices, "_out_features": [new_names[k] for k in new_indices]}


def find_config_copies(
    stack: BlockStack,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    sources: Sequence[int],
    among: Iterable[nn.Module] | None = None,
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield each module attribute that repeats a changed value of a configuration, with its new value.

    `old` and `new` are the changed values of the configuration, `sources` the blocks whose per-layer values the slots
    have, and `among` the modules to search, if those with copies are known.
    """
    lists = [list(value) for value in old.values() if isinstance(value, (list, tuple))]
    numbers = [values for values in lists if all(type(value) is int for value in values)]
    ours: set[nn.Module] = set()
    if among is None:
        among = dict.fromkeys([*stack.ancestors, *stack.ancestors[-1].modules()])
    for module in among:
        for name, current in vars(module).items():
            if name.startswith("_") and name not in new:  # internals of torch: hooks by number, parameters by name
                continue
            if isinstance(current, (list, tuple)) and any(current is value for value in old.values()):
                yield module, name, next(new[key] for key, value in old.items() if current is value)
            elif name in new and type(current) is int and module not in (ours := ours or set(_modules_of_stack(stack))):
                continue  # another stack of the same length, inside this one
            elif name in new and type(current) is type(old[name]) and current == old[name]:
                yield module, name, new[name]
            elif name in _FIRST_NUMBERS:
                count = new.get(_FIRST_NUMBERS[name], getattr(stack.config, _FIRST_NUMBERS[name], 0))
                yield module, name, len(sources) - count
            elif name in _NUMBERS_OF_OTHER_BLOCKS and current in sources:
                yield module, name, sources.index(current)
            elif type(current) is dict and current and list(current) in numbers:
                yield module, name, {slot: current[source] for slot, source in enumerate(sources) if source in current}


def _modules_of_stack(stack: BlockStack) -> Iterator[nn.Module]:
    """Yield the modules around and in the blocks, except those with blocks of their own, such as a vision tower."""
    yield from stack.ancestors
    waiting: list[nn.Module] = list(stack.blocks)
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module.children() if not _has_blocks(child)]


def _has_blocks(module: nn.Module) -> bool:
    lists = [child for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    return any(len(items) > 1 and any(True for item in items for _ in item.children()) for items in lists)


def renumber_tied_weights(stack: BlockStack, sources: Sequence[int]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the new tables of tied weights, which name blocks by path, like `find_config_copies`."""
    parts = stack.path.split(".")
    for depth, module in enumerate(stack.ancestors):
        stack_path = ".".join(parts[depth:])
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied_keys = getattr(module, name, None)
            if not isinstance(tied_keys, dict) or not any(
                key.startswith(f"{stack_path}.") for pair in tied_keys.items() for key in pair
            ):
                continue
            pairs = [
                (_renumbered_path(a, stack_path, sources), _renumbered_path(b, stack_path, sources))
                for a, b in tied_keys.items()
            ]
            yield module, name, {a: b for a, b in pairs if a is not None and b is not None}


def _renumbered_path(path: str, inside: str, sources: Sequence[int]) -> str | None:
    """Return the path of a weight after the surgery, or None if its block is removed."""
    if not path.startswith(f"{inside}."):
        return path
    number, dot, rest = path.removeprefix(f"{inside}.").partition(".")
    if not number.isdigit():
        return path
    return f"{inside}.{sources.index(int(number))}{dot}{rest}" if int(number) in sources else None
