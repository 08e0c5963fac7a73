"""Find reasons why removing or inserting a block would change more than that block."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamline_hooks.core import describe_blocks
from streamline_hooks.modeling import BlockStack
from streamline_hooks.surgery.layer_indices import KEY_SHARING, config_for_blocks, configs_of_stack
from streamline_hooks.surgery.special_weights import QuantizerSettings, per_layer_weights_obstacle


@dataclass(frozen=True)
class Hazard:
    """A reason against a surgery.

    Attributes
    ----------
    cause : str
        Short name, for comparisons in code.
    text : str
        What would go wrong, with the blocks that are affected.

    Examples
    --------
    >>> str(Hazard("tied-blocks", "blocks 1, 3 share parameters"))
    'blocks 1, 3 share parameters'
    """

    cause: str
    text: str

    def __str__(self) -> str:
        return self.text


def find_hazards(stack: BlockStack, window: range) -> list[Hazard]:
    """Return the hazards of removing a window that the model's structure and its configuration show.

    Parameters
    ----------
    stack : BlockStack
        Stack of blocks; see `find_stack`.
    window : range
        Half-open range of consecutive blocks.

    Returns
    -------
    list of Hazard
        Empty if none is known. `LayerSurgeon.check` additionally runs the model.

    Examples
    --------
    >>> from streamline_hooks.modeling import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> find_hazards(find_stack(tiny_model("llama")), range(1, 2))
    []
    """
    return [
        *find_dependency_hazards(stack, window),
        *find_index_hazards(stack, window.start),
        *_decoder_cache(stack, [k for k in range(len(stack)) if k not in window]),
    ]


def find_dependency_hazards(stack: BlockStack, window: range) -> list[Hazard]:
    """Return hazards from other blocks that depend on the blocks of a window, independent of the numbering."""
    causes = (_shared_blocks, _shared_keys, _shared_choices, _position_bias, _per_layer_embeddings, _derived_settings)
    return [hazard for cause in causes for hazard in cause(stack, window)]


def find_index_hazards(stack: BlockStack, first: int) -> list[Hazard]:
    """Return the hazards of renumbering the blocks from `first` on."""
    causes = (_scale_by_index, _features_by_index, _quantized_by_index)
    return [hazard for cause in causes for hazard in cause(stack, first)]


def find_insertion_hazards(stack: BlockStack, k: int, slots: int) -> list[Hazard]:
    """Return the hazards of inserting a block before block k, so that the stack has `slots` blocks."""
    sources = [min(slot, len(stack) - 1) for slot in range(slots)]
    return [*_displaced_position_bias(stack, k), *find_index_hazards(stack, k), *_decoder_cache(stack, sources)]


def position_bias_owners(stack: BlockStack) -> list[int]:
    """Return the blocks that hold the relative position bias of all blocks, or [] if there are no such blocks."""
    owners = _blocks_with_position_bias(stack)
    return owners if len(owners) < len(stack) else []


def _blocks_with_position_bias(stack: BlockStack) -> list[int]:
    name = "relative_attention_bias"
    return [k for k, block in enumerate(stack.blocks) if any(name in path for path, _ in block.named_modules())]


def _shared_blocks(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Find blocks with shared parameters: removing the block at one position does not free them."""
    owners: dict[int, set[int]] = defaultdict(set)
    present = set(stack.container.children())  # a removed block may still hold parameters that another block uses
    for k, block in enumerate(stack.blocks):
        for parameter in block.parameters() if block in present else ():
            owners[id(parameter)].add(k)
    for blocks in {tuple(sorted(ks)) for ks in owners.values() if len(ks) > 1 and ks & set(window)}:
        listed = ", ".join(map(str, blocks))
        yield Hazard("tied-blocks", f"blocks {listed} share parameters, so that removing one of them frees no memory")


def _shared_keys(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Find a block whose keys the last blocks attend to (Gemma 3n, Gemma 4)."""
    shared = getattr(stack.config, "num_kv_shared_layers", 0) or 0
    if not 0 < shared < len(stack):
        return
    first = len(stack) - shared
    kinds = getattr(stack.config, "layer_types", None) or ["attention"] * len(stack)
    for kind in sorted(set(kinds)):
        producers = [k for k in range(first) if kinds[k] == kind]
        readers = [k for k in range(first, len(stack)) if kinds[k] == kind and k not in window]
        if producers and readers and producers[-1] in window:
            span = f"{readers[0]} to {readers[-1]} share" if len(readers) > 1 else f"{readers[0]} reads"
            yield Hazard("shared-keys", f"block {producers[-1]} produces the keys that {span}")


def _shared_choices(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Find a block that chooses the tokens to which the next blocks attend (sparse attention of GLM and Hy4)."""
    kinds = getattr(stack.config, "indexer_types", None) or ()
    if len(kinds) != len(stack):
        return
    for k in window:
        later = range(k + 1, len(stack))
        last = next((n for n in later if kinds[n] != "shared"), len(stack))
        readers = [n for n in range(k + 1, last) if n not in window]
        if kinds[k] != "shared" and readers:
            span = f"s {readers[0]} to {readers[-1]} attend" if len(readers) > 1 else f" {readers[0]} attends"
            yield Hazard("shared-choices", f"block {k} chooses the tokens to which block{span}")


def _position_bias(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Find blocks that hold the relative position bias of all blocks (T5)."""
    owners = position_bias_owners(stack)
    if set(owners) & set(window):
        listed = ", ".join(map(str, owners))
        yield Hazard("position-bias", f"block {listed} owns the relative position bias that the other blocks use")


def _displaced_position_bias(stack: BlockStack, k: int) -> Iterator[Hazard]:
    """Find a block that computes the relative position bias of all blocks and must stay the first one (T5)."""
    owners = position_bias_owners(stack) if len(stack) > 1 else _blocks_with_position_bias(stack)
    if owners and k <= owners[0]:
        yield Hazard(
            "position-bias",
            f"block {owners[0]} computes the relative position bias that the other blocks use, and only the first "
            "block of the stack can compute it",
        )


def _per_layer_embeddings(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Find an embedding with one slice per block whose slices cannot be selected."""
    reason = per_layer_weights_obstacle(stack)
    if reason is not None:
        yield Hazard("per-layer-embeddings", reason)


def _derived_settings(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Find a per-block list that the configuration derives, and cannot derive correctly for the remaining blocks."""
    config = stack.config
    if config is None:
        return
    kept = [k for k in range(len(stack)) if k not in window]
    shorter = _config_for_sources(config, stack, kept)
    # Reading a deprecated property, which only the base class has, warns.
    bases = [base for base in type(config).__mro__ if base.__name__.lower() == "pretrainedconfig"]
    common = {name for base in bases for name in vars(base)}
    for name, member in inspect.getmembers(type(config), lambda m: isinstance(m, property)):
        if name in common or name in vars(config) or name == KEY_SHARING:
            continue
        current, shorter_list = (_read_property(member, c) for c in (config, shorter))
        if not isinstance(current, list) or len(current) != len(stack):
            continue
        wanted = [current[k] for k in kept]
        position = next((k for k, (a, b) in enumerate(zip(wanted, shorter_list or (), strict=False)) if a != b), None)
        if position is not None:
            yield Hazard(
                "derived-settings",
                f"{type(config).__name__} derives {name} from other settings: block {kept[position]}, renumbered to "
                f"{position}, would have {shorter_list[position]!r} instead of {wanted[position]!r}",
            )
            return


def _decoder_cache(stack: BlockStack, sources: Sequence[int]) -> Iterator[Hazard]:
    """Find a decoder whose cache is sized by the number of encoder blocks (ProphetNet; T5 in Transformers 4)."""
    owner, count = stack.ancestors[0], stack.count_attribute
    config: Any = getattr(owner, "config", None)
    is_decoder = count in ("num_decoder_layers", "decoder_layers")
    before = getattr(config, str(count) if is_decoder else "num_decoder_layers", None)
    if not getattr(config, "is_encoder_decoder", False) or not callable(getattr(owner, "generate", None)):
        return
    if count is None or not isinstance(before, int):
        return
    after = len(sources) if is_decoder else before
    changed_configs = configs_of_stack(stack)
    for described_config in {id(c): c for c in (config, *(changed_configs if is_decoder else ()))}.values():
        changes = any(described_config is each for each in changed_configs)
        cache_before = _cache_length(described_config)
        cache_after = _cache_length(_config_for_sources(described_config, stack, sources)) if changes else cache_before
        if before <= cache_before and 0 < cache_after < after:
            yield Hazard(
                "decoder-cache",
                f"Transformers sizes the cache of the {after} decoder blocks by another count, which would be "
                f"{cache_after}",
            )
            return


def _config_for_sources(config: Any, stack: BlockStack, sources: Sequence[int]) -> Any:
    """Return a copy of a configuration that describes a stack of the blocks `sources`."""
    changed = copy.copy(config)
    vars(changed).update(config_for_blocks(config, str(stack.count_attribute), len(stack), sources, stack.stage))
    return changed


def _cache_length(config: Any) -> int:
    """Return the number of blocks that the cache has entries for, or 0 if the cache grows."""
    from transformers import DynamicCache

    return len(DynamicCache(config=config).layers)


def _read_property(member: Any, config: Any) -> Any:
    try:
        return member.fget(config)
    except Exception:  # a property may need settings that this configuration lacks
        return None


def _scale_by_index(stack: BlockStack, first: int) -> Iterator[Hazard]:
    """Find attention that is scaled by the block's index at run time (GPT-2 in Transformers 4).

    Later versions compute the scale when the block is built. It is then correct in memory, and refused on commit.
    """
    later_modules = (module for block in stack.blocks[first:] for module in block.modules())
    if any(getattr(m, "scale_attn_by_inverse_layer_idx", False) and not hasattr(m, "scaling") for m in later_modules):
        yield Hazard(
            "scale-by-index", f"attention is scaled by the block index in {describe_blocks(range(first, len(stack)))}"
        )


def _features_by_index(stack: BlockStack, first: int) -> Iterator[Hazard]:
    """Find features of a vision tower that are added to the text states at fixed block indices (Qwen3-VL).

    A probe with text alone does not reveal them.
    """
    parameters = inspect.signature(stack.ancestors[-1].forward).parameters
    if not {"deepstack_visual_embeds", "deepstack_features"} & {*parameters}:
        return
    configs = [config for module in stack.ancestors if (config := getattr(module, "config", None)) is not None]
    for config in [*configs, *(getattr(config, "vision_config", None) for config in configs)]:
        # In the tower, the indices of blocks. In the text model, features are added at the first len(indexes) blocks.
        indexes = getattr(config, "deepstack_visual_indexes", None) or ()
        last = max([len(indexes) - 1, *(number for _, number in getattr(config, "deepstack_layer_map", None) or ())])
        if first <= last:
            yield Hazard(
                "features-by-index",
                f"features of the vision tower are added at blocks up to {last} by index, which would be other blocks "
                "after renumbering",
            )
            return


def _quantized_by_index(stack: BlockStack, first: int) -> Iterator[Hazard]:
    """Find quantizer settings that select blocks by a pattern of indices, which cannot be renumbered."""
    pattern = QuantizerSettings(stack).pattern(first)
    if pattern is not None:
        yield Hazard(
            "quantized-by-index",
            f"the quantizer's settings select blocks by a pattern ({pattern}), which would select other blocks after "
            "renumbering: list the full names of the modules instead",
        )
